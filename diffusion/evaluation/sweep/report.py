"""What a sweep found, for machines (sweep.json) and for people (sweep.md, pareto.png).

Nothing in these depends on when, where or by how many workers it was made.  What does, the seconds, is in timing.json.
"""

import json
from contextlib import suppress
from pathlib import Path
from typing import Literal

from pydantic import Field

from diffusion.data.images import encode_png
from diffusion.evaluation.extractors.features import ExtractorIdentity
from diffusion.evaluation.identity import SampleIdentity
from diffusion.evaluation.metrics.intervals import digits, half_width
from diffusion.evaluation.metrics.sample import Distance
from diffusion.evaluation.report.report import Environment
from diffusion.evaluation.sweep.plot import pareto_plot
from diffusion.recipe import Frozen, SamplingRecipe, Setting, SweepRecipe, canonical_json, digest_of, unset
from diffusion.store.publish import publishing, read_published, room_in
from diffusion.store.refs import RunRef, SweepRef

FILE = "sweep.json"
TIMING = "timing.json"


class Tried(Frozen):
    """A setting, and its Frechet distance at as many samples as it got."""

    setting: Setting
    evaluations: int = Field(description="Rows that the network is asked for one picture of a class")
    samples: int
    value: float | None = Field(None, exclude_if=unset)
    standard_error: float | None = Field(None, exclude_if=unset)
    low: float | None = Field(None, exclude_if=unset)
    high: float | None = Field(None, exclude_if=unset)
    dropped_for: int | None = Field(None, exclude_if=unset, description="Number of the setting that is better")
    problem: str | None = Field(None, exclude_if=unset, description="Why it gives no pictures")

    @classmethod
    def of(cls, setting: Setting, evaluations: int, samples: int, distance: Distance) -> "Tried":
        half = half_width(distance.standard_error, len(distance.left_out) - 1)
        return cls(
            setting=setting,
            evaluations=evaluations,
            samples=samples,
            value=digits(distance.value),
            standard_error=digits(distance.standard_error),
            low=digits(max(0.0, distance.value - half)),
            high=digits(distance.value + half),
        )


class Sweep(Frozen):
    """All that was tried on one run, with what the numbers depend on."""

    format: Literal[1] = 1
    metric: Literal["frechet/1"] = "frechet/1"
    run_digest: str
    recipe_digest: str  # of training
    dataset_digest: str
    images_seen: int
    extractor: ExtractorIdentity
    reference_pictures: int
    sampling: SamplingRecipe  # what the settings leave open
    batch_size: int
    sweep: SweepRecipe
    tried: tuple[Tried, ...]  # in the order of the grid
    front: tuple[int, ...]  # numbers of those that nothing beats in time and distance, the fastest first
    best: int
    chosen: int
    certain: bool = Field(description="Whether it is within tolerance of every other, with confidence")
    environment: Environment

    @property
    def digest(self) -> str:
        """sha256 of sweep.json."""
        return digest_of(self)

    def metrics(self) -> dict[str, float]:
        """Name -> value, for a tracker."""
        named = {"chosen": self.tried[self.chosen], "best": self.tried[self.best]}
        found: dict[str, float] = {"settings": len(self.tried)}
        for name, one in named.items():
            found |= {f"{name}_frechet": one.value, f"{name}_frechet_standard_error": one.standard_error}
            found |= {f"{name}_evaluations": one.evaluations}
        return found


def publish_sweep(found: Sweep, store_root: Path, run: RunRef, seconds: list[float | None]) -> SweepRef:
    """Write it below store_root/sweeps, once.  seconds: a picture, of each setting, as measured; None: not drawn."""
    final = Path(store_root) / "sweeps" / found.digest[:16]
    timing = [{"setting": one.setting.model_dump(), "seconds": s} for one, s in zip(found.tried, seconds, strict=True)]
    # else it is the same, found before or meanwhile
    with suppress(FileExistsError), room_in(final.parent, "the sweep"), publishing(final) as folder:
        (folder / "pareto.png").write_bytes(encode_png(pareto_plot(found)))
        (folder / "sweep.md").write_text(markdown(found), encoding="utf-8")
        (folder / TIMING).write_text(json.dumps(timing, indent=1), encoding="utf-8")
        (folder / FILE).write_bytes(canonical_json(found))
    load_sweep(final, found.digest)
    return SweepRef(
        uri=str(final),
        digest=found.digest,
        run=run,
        chosen=found.tried[found.chosen].setting,
        metrics=found.metrics(),
    )


def load_sweep(uri: str | Path, digest: str | None = None) -> Sweep:
    """The sweep published in folder `uri`; where `digest` is given, only that very one.  Raises ValueError."""
    return Sweep.model_validate_json(read_published(uri, FILE, digest, what="sweep", command="diffusion sweep"))


def load_seconds(uri: str | Path) -> list[float | None]:
    """Seconds a picture of each setting, as measured when it was drawn: on that machine, beside what else it did."""
    return [one["seconds"] for one in json.loads((Path(uri) / TIMING).read_text("utf-8"))]


def table(found: Sweep, seconds: list[float | None] | None = None) -> list[tuple[str, ...]]:
    """What was tried, a row of words each under a first row of titles, by time and distance; with seconds where known."""
    titles = ("", "average", "sampler", "steps", "guidance", "evaluations", "samples", "Frechet distance", "")
    rows = [titles[:6] + (("s/picture",) if seconds else ()) + titles[6:]]
    order = sorted(range(len(found.tried)), key=lambda i: (found.tried[i].evaluations, found.tried[i].value or 0, i))
    for number in order:
        one = found.tried[number]
        drawn, distance = one.setting, "" if one.value is None else f"{one.value:.4g} ± {one.standard_error:.2g}"
        row = (str(number), f"{drawn.ema:g}", drawn.sampler, str(drawn.steps), f"{drawn.guidance:g}")
        row += (str(one.evaluations),)
        if seconds:
            row += ("" if seconds[number] is None else f"{seconds[number]:.3g}",)
        rows.append((*row, str(one.samples), distance, _said(found, number)))
    return rows


def _said(found: Sweep, number: int) -> str:
    one = found.tried[number]
    if one.problem is not None:
        return f"gives no pictures: {one.problem}"
    if one.dropped_for is not None:
        return f"dropped: {one.dropped_for} is better in no more time"
    names = {"chosen": number == found.chosen, "best": number == found.best, "on the front": number in found.front}
    return ", ".join(name for name, holds in names.items() if holds)


def markdown(found: Sweep) -> str:
    """For people."""
    chosen, best = found.tried[found.chosen], found.tried[found.best]
    first, *rest = table(found)
    rows = ["| " + " | ".join(row) + " |" for row in (first, ("---",) * len(first), *rest)]
    excess = f"{found.sweep.tolerance:.0%}"
    said = f"**Chosen: {chosen.setting}.** Frechet distance {chosen.value:.4g} in {chosen.evaluations} evaluations."
    told = f"with {found.sweep.confidence:.0%} confidence it exceeds no other's by {excess} or more"
    if not found.certain:
        said += (
            f" It is the lowest as measured, but of none can be said that it is within {excess} of all others: more samples"
            f" (`sweep.samples`) or a larger `sweep.tolerance` would tell."
        )
    elif found.chosen == found.best:
        said += f" It is the lowest, {told}, and of no faster one can that be said."
    else:
        said += (
            f" The lowest is {best.value:.4g} in {best.evaluations} evaluations ({best.setting}). Of the chosen: {told},"
            f" and of those of which that can be said it is the fastest."
        )
    notes = (
        "Evaluations are rows that the network is asked for one picture; a guided answer takes two. Lower distances are"
        f" better, and are comparable at equal numbers of samples alone (seed {found.sweep.seed}, the same for all"
        " settings). A setting is dropped where another that takes no longer is better beyond doubt: by the jackknife of the"
        f" difference of the two on the same seeds, at {found.sweep.confidence:.0%} for all comparisons of a round"
        " together, both as it is and freed of what is due to so few samples. ± is the standard error of a distance by"
        " itself, and larger than that of a difference."
    )
    facts: dict[str, object] = {
        "metric": found.metric,
        "training run": found.run_digest,
        "training recipe": found.recipe_digest,
        "dataset": found.dataset_digest,
        "images seen": found.images_seen,
        "reference": f"{found.reference_pictures:,} pictures of the split train",
        **{f"extractor {name}": value for name, value in found.extractor.model_dump().items()},
        **{f"sampling {name}": value for name, value in found.sampling.model_dump(exclude=_SWEPT).items()},
        "labels": SampleIdentity.model_fields["labels"].default,
        "batch_size (drawn at once)": found.batch_size,
        "torch": found.environment.torch,
        "device": found.environment.device,
    }
    identity = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts.items())]
    return "\n\n".join(
        (
            f"# Sweep over {len(found.tried)} ways of drawing with run {found.run_digest[:12]}",
            said,
            "![Frechet distance against evaluations](pareto.png)",
            "\n".join(rows),
            notes,
            "## Identity of the numbers",
            "\n".join(identity) + "\n",
        )
    )


_SWEPT = set(Setting.model_fields) - {"ema"}
