"""Averages of a run's weights, out of its checkpoints: one that it kept, or one of any other width, put together from all.

All that is read is verified, and belongs to the run.  Raw weights are never read.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import safetensors.torch
from pydantic import Field, ValidationError
from torch import Tensor

from diffusion.codec import CodecIdentity
from diffusion.ema import Snapshot, combine, post_hoc_coefficients
from diffusion.recipe import EvaluateRecipe, Frozen, TrainRecipe, canonical_json, checkpoints_of, digest_of
from diffusion.store.publish import read_checked
from diffusion.store.refs import RunRef
from diffusion.text import TextIdentity

MANIFEST_NAME = "manifest.json"
STATE_NAME = "state.json"
# Of a reconstruction.  With the demo's checkpoints of a small denoiser, below this the weights were nearer the true average
# than any that was kept, and the loss within 0.03 % of it; at 0.19 (width 0.02) no nearer, at 0.24 (width 0.2) off by 0.4 %.
MAX_ERROR = 0.1
_DAMAGED = (
    "A published checkpoint never changes, so this copy is damaged: put an intact one back, or delete this checkpoint and"
    " those after it and run `diffusion train` again, it goes on from the one before."
)

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class File(Frozen):
    bytes: int
    sha256: Digest


class Manifest(Frozen):
    """manifest.json of a checkpoint: every file with its digest, and which file holds which average."""

    format: Literal[1] = 1
    images_seen: int
    recipe_digest: Digest
    dataset_digest: Digest
    weights: str
    ema: dict[str, str] = Field(description="Relative width as Python writes it -> file name")
    files: dict[str, File]


class Source(Frozen):
    """A checkpoint: its moment and its digest."""

    images_seen: int
    digest: Digest


class Reconstruction(Frozen):
    """How an average that the run did not keep was put together: from every average in these checkpoints."""

    error: float = Field(ge=0, description="What of its profile is missed, as a share  [see post_hoc_coefficients]")
    checkpoints: tuple[Source, ...]


class Average(NamedTuple):
    """Averaged weights, the checkpoint of their moment, and how they were put together where the run did not keep them."""

    weights: dict[str, Tensor]  # name -> float32
    checkpoint: Source
    reconstruction: Reconstruction | None


def wanted_by(recipe: EvaluateRecipe, run_images: int) -> tuple[Snapshot, Snapshot | None]:
    """The averages that an evaluation of a run of this length serves: the model's, and its guide's if it has one."""
    guide = Snapshot(recipe.guide_images, recipe.guide_ema or recipe.ema) if recipe.guide_images else None
    return Snapshot(recipe.images or run_images, recipe.ema), guide


def at(run: RunRef, images_seen: int) -> RunRef:
    """A run as far as one of its checkpoints.  Raises ValueError where there is none, or another run's."""
    folder, manifest = read_manifest(run, images_seen)
    return run.model_copy(update={"uri": str(folder), "digest": digest_of(manifest), "images_seen": images_seen})


def moments_read(evaluate: EvaluateRecipe, train: TrainRecipe, widths: tuple[float, ...] = ()) -> tuple[int, ...]:
    """images_seen of the checkpoints that an evaluation of a run reads, ascending.  widths: others that a sweep tries in
    place of evaluate.ema.  [see read_average]"""
    moments, asked = checkpoints_of(train), (evaluate.ema, *widths)
    recipes = (evaluate.model_copy(update={"ema": width}) for width in asked)
    wanted = [average for recipe in recipes for average in wanted_by(recipe, moments[-1]) if average]
    made = [average.images_seen for average in wanted if average.sigma_rel not in train.ema]  # of all until then
    return tuple(m for m in moments if m in {average.images_seen for average in wanted} or m <= max(made, default=0))


def check_averages(recipe: TrainRecipe, wanted: Snapshot) -> tuple[list[Snapshot], np.ndarray, float]:
    """What an average that a run of this recipe does not keep is put together from: (averages, coefficients, error).

    Of a checkpoint later than the wanted moment nothing is used.  Raises ValueError where the result would be poor.
    """
    moments = [*(m for m in checkpoints_of(recipe) if m < wanted.images_seen), wanted.images_seen]
    kept = [Snapshot(moment, width) for moment in moments for width in recipe.ema]
    coefficients, error = post_hoc_coefficients(kept, wanted)
    if error > MAX_ERROR:
        raise ValueError(
            f"an average of relative width {wanted.sigma_rel:g} cannot be put together from those of the widths"
            f" {', '.join(f'{width:g}' for width in recipe.ema)} that the run keeps at {', '.join(map(str, moments))}"
            f" images: {error:.1%} of its profile would be missed, and at most {MAX_ERROR:.0%} is accepted. Choose a width"
            f" nearer to those (--set evaluate.ema=...), or train with two widths farther apart (--set train.ema=0.05,0.2)"
            f" and more checkpoints (--set train.checkpoint_images={max(recipe.checkpoint_images // 4, 1)})"
        )
    return kept, coefficients, error


def read_average(run: RunRef, wanted: Snapshot) -> Average:
    """One average of a run, as its checkpoint kept it, or else put together by `check_averages`.

    Raises ValueError for a checkpoint that is missing, damaged or another run's, naming the file.
    """
    folder, manifest = read_manifest(run, wanted.images_seen)
    here = Source(images_seen=manifest.images_seen, digest=digest_of(manifest))
    if repr(wanted.sigma_rel) in manifest.ema:
        return Average(_read(folder, manifest, wanted.sigma_rel), here, None)
    kept, coefficients, error = check_averages(read_recipe(run).recipe, wanted)
    checkpoints = {moment: read_manifest(run, moment) for moment in dict.fromkeys(s.images_seen for s in kept)}
    weights: Iterator[dict[str, Tensor]] = (_read(*checkpoints[s.images_seen], s.sigma_rel) for s in kept)
    sources = tuple(Source(images_seen=m, digest=digest_of(manifest)) for m, (_, manifest) in checkpoints.items())
    made = Reconstruction(error=float(f"{error:.6g}"), checkpoints=sources)
    return Average(combine(weights, coefficients), here, made)


def read_manifest(run: RunRef, images_seen: int) -> tuple[Path, Manifest]:
    """The checkpoint of one moment of a run, (folder, manifest).  Its files are not read."""
    last = Path(run.uri)
    # the names of a run's checkpoints are its moments, of equal width
    folder = last if images_seen == run.images_seen else last.with_name(f"{images_seen:0{len(last.name)}d}")
    path = folder / MANIFEST_NAME
    if not path.is_file():
        moments = sorted(int(p.parent.name) for p in last.parent.glob(f"*/{MANIFEST_NAME}") if p.parent.name.isdigit())
        raise ValueError(
            f"{folder} is no checkpoint: it has no {path.name}; there are those at {', '.join(map(str, moments)) or 'no'}"
            f" images. What evaluate.images and evaluate.guide_images name are of these, and an average of a width that the"
            f" run did not keep needs every one: put the missing one back, or delete those after it and run `diffusion"
            f" train` again. (DIFFUSION_KEEP_LAST deletes those that the evaluation asked for when the run was trained does"
            f" not read.)"
        )
    data = path.read_bytes() if folder != last else read_checked(path, run.digest, _DAMAGED)
    try:
        manifest = Manifest.model_validate_json(data)
    except ValidationError as error:
        raise ValueError(f"{path} is no manifest of a checkpoint. {_DAMAGED}") from error
    if hashlib.sha256(data).hexdigest() != digest_of(manifest):
        raise ValueError(f"{path} is not in canonical form: it was edited after it was published. {_DAMAGED}")
    made = (manifest.recipe_digest, manifest.dataset_digest, manifest.images_seen)
    if made != (run.recipe_digest, run.dataset.digest, images_seen):
        raise ValueError(f"{folder} was made from another recipe, dataset or length than the reference to it says")
    return folder, manifest


class Trained(NamedTuple):
    """A run's recipe, what read its captions, and what made its latents."""

    recipe: TrainRecipe
    text: TextIdentity | None
    codec: CodecIdentity | None


def read_recipe(run: RunRef) -> Trained:
    """What a run was trained by, out of its last checkpoint."""
    folder, manifest = read_manifest(run, run.images_seen)
    facts = json.loads(read_checked(folder / STATE_NAME, manifest.files[STATE_NAME].sha256, _DAMAGED))
    text = TextIdentity.model_validate(facts["text"]) if "text" in facts else None
    codec = CodecIdentity.model_validate(facts["codec"]) if "codec" in facts else None
    return Trained(TrainRecipe.model_validate_json(canonical_json(facts["recipe"])), text, codec)


def _read(folder: Path, manifest: Manifest, sigma_rel: float) -> dict[str, Tensor]:
    name = manifest.ema[repr(sigma_rel)]
    return safetensors.torch.load(read_checked(folder / name, manifest.files[name].sha256, _DAMAGED))
