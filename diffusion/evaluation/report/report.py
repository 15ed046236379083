"""The report on a model: every number with its identity, for machines (report.json) and for people (report.md, pictures).

Nothing in it depends on when, where or by how many workers it was made: the same model and recipe give the same bytes.
"""

from collections.abc import Mapping
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from diffusion.codec import CodecIdentity
from diffusion.data.images import encode_png, grid
from diffusion.evaluation.facts.agreement import Agreement
from diffusion.evaluation.facts.bound import HeldOutBound
from diffusion.evaluation.facts.by_class import ByClass
from diffusion.evaluation.facts.distance import FloorFacts, Frechet, FrechetLimit
from diffusion.evaluation.facts.held_out import HeldOutLoss
from diffusion.evaluation.facts.memorized import Memorization
from diffusion.evaluation.facts.neighbours import Kernel, Neighbours
from diffusion.evaluation.facts.restoration import Restoration
from diffusion.evaluation.report.plot import bound_plot, loss_plot
from diffusion.evaluation.report.words import markdown
from diffusion.recipe import Frozen, canonical_json, digest_of, unset
from diffusion.store.averages import Reconstruction
from diffusion.store.bundle_spec import Guide
from diffusion.store.publish import publishing, read_published, room_in
from diffusion.store.refs import EvaluationRef, RunRef
from diffusion.text import TextIdentity

FILE = "report.json"


class Environment(Frozen):
    """What the last digits may depend on."""

    torch: str
    device: str


class Report(Frozen):
    """All that was measured of one bundle."""

    format: Literal[1] = 1
    bundle_digest: str
    run_digest: str
    recipe_digest: str  # of training
    dataset_digest: str
    classes: tuple[str, ...]
    images_seen: int
    ema: float
    reconstruction: Reconstruction | None = Field(None, exclude_if=unset)  # of that average, where the run kept others
    guide: Guide | None = Field(None, exclude_if=unset)
    text: TextIdentity | None = Field(None, exclude_if=unset)  # what read the captions, if anything did
    codec: CodecIdentity | None = Field(None, exclude_if=unset)  # what made pictures of latents, if anything did
    teacher: str | None = Field(None, exclude_if=unset, description="Of a few-step student: its teacher's bundle")
    chosen_by: str | None = Field(
        None, exclude_if=unset, description="Digest of the sweep that chose how it draws, if one did"
    )
    frechet: Frechet | None
    frechet_limit: FrechetLimit | None = Field(None, exclude_if=unset, description="Absent: too few samples")
    floor: FloorFacts | None
    kernel: Kernel | None = Field(None, exclude_if=unset)
    neighbours: Neighbours | None = Field(None, exclude_if=unset)
    held_out: tuple[HeldOutLoss, ...]
    bound: HeldOutBound | None = Field(None, exclude_if=unset, description="Absent: not measured")
    by_class: ByClass | None = Field(None, exclude_if=unset, description="Absent: the data are of one class")
    agreement: Agreement | None = Field(None, exclude_if=unset, description="Absent: no joint encoder, or no captions")
    memorization: Memorization | None = Field(None, exclude_if=unset, description="Absent: nothing is held out")
    restoration: tuple[Restoration, ...] = Field((), exclude_if=unset, description="Absent: not measured")
    seed: int
    problems: tuple[str, ...]
    environment: Environment

    @property
    def digest(self) -> str:
        """sha256 of report.json."""
        return digest_of(self)

    def metrics(self) -> dict[str, float]:
        """Name -> value of every finite number, for a tracker."""
        found: dict[str, float | None] = {}
        if self.frechet:
            found |= {"frechet": self.frechet.value, "frechet_standard_error": self.frechet.standard_error}
            found |= {"frechet_low": self.frechet.low, "frechet_high": self.frechet.high}
        if self.frechet_limit:
            found |= {"frechet_limit": self.frechet_limit.value}
            found |= {"frechet_limit_low": self.frechet_limit.low, "frechet_limit_high": self.frechet_limit.high}
        if self.floor:
            found["frechet_floor"] = self.floor.value
        if self.kernel:
            found |= {"kernel": self.kernel.value, "kernel_standard_error": self.kernel.standard_error}
            found |= {"kernel_low": self.kernel.low, "kernel_high": self.kernel.high}
        for name, each in (self.neighbours.measured if self.neighbours else {}).items():
            found |= {name: each.value, f"{name}_low": each.low, f"{name}_high": each.high, f"{name}_real": each.real}
        for level in self.held_out:
            name = f"held_out_loss_sigma_{level.sigma:g}"
            found |= {name: level.loss} | dict(zip((f"{name}_low", f"{name}_high"), level.interval or (), strict=False))
        if self.bound:
            found |= {"bound_bits": self.bound.value, "bound_bits_standard_error": self.bound.standard_error}
            found |= {"bound_bits_low": self.bound.low, "bound_bits_high": self.bound.high}
        if self.agreement:
            found |= self.agreement.metrics()
        if self.memorization:
            found |= self.memorization.metrics()
        for task in self.restoration:
            found |= task.metrics()
        return {name: value for name, value in found.items() if value is not None}


def publish_report(
    report: Report,
    store_root: Path,
    *,
    run: RunRef,
    bundle_uri: str,
    pictures: Mapping[str, np.ndarray],
) -> EvaluationRef:
    """`write_report` of a run."""
    return EvaluationRef(
        uri=str(write_report(report, store_root, pictures)),
        digest=report.digest,
        bundle_uri=bundle_uri,
        bundle_digest=report.bundle_digest,
        run=run,
        metrics=report.metrics(),
    )


def write_report(report: Report, store_root: Path, pictures: Mapping[str, np.ndarray]) -> Path:
    """Write report.md, its pictures and plots (loss, bound) and report.json below store_root/evaluations, once.  Returns
    the folder.

    pictures: by name, as in {"grid": ...} of grid.png, each uint8 (H, W, 3).
    """
    final = Path(store_root) / "evaluations" / report.digest[:16]
    # else it is the same report, made before or meanwhile
    with suppress(FileExistsError), room_in(final.parent, "the report"), publishing(final) as folder:
        for name, picture in pictures.items():
            (folder / f"{name}.png").write_bytes(encode_png(picture))
        if report.held_out:
            (folder / "loss.png").write_bytes(encode_png(loss_plot(report.held_out)))
        if report.bound:
            (folder / "bound.png").write_bytes(encode_png(bound_plot(report.bound)))
        (folder / "report.md").write_text(markdown(report), encoding="utf-8")
        (folder / FILE).write_bytes(canonical_json(report))
    load_report(final, report.digest)
    return final


def load_report(uri: str | Path, digest: str | None = None) -> Report:
    """The report published in folder `uri`; where `digest` is given, only that very one.  Raises ValueError."""
    return Report.model_validate_json(read_published(uri, FILE, digest, what="report", command="diffusion evaluate"))


def class_grid(rows: list[list[np.ndarray]], classes: tuple[str, ...]) -> np.ndarray:
    """One labelled row for each class, white where a class has fewer pictures.  Returns uint8 (H, W, 3)."""
    columns = max(1, *map(len, rows))
    side = next((picture.shape[0] for picture in chain.from_iterable(rows)), 32)
    blank = np.full((side, side, 3), 255, np.uint8)
    cells = [picture for row in rows for picture in (row + [blank] * columns)[:columns]]
    return grid(cells, columns, classes)
