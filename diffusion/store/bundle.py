"""The bundle: all that serving needs and nothing else.  Averaged weights as safetensors, and bundle.json, whose sha256
is the model's digest.  There is no pickle in it, and no raw weights."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import safetensors.torch
import torch
from pydantic import Field, model_validator
from safetensors import SafetensorError
from torch import Tensor

from diffusion.degradation import image_channels
from diffusion.denoiser import Denoiser, denoiser_of
from diffusion.recipe import (
    Frozen,
    PredictionName,
    SamplingRecipe,
    TaskName,
    TrainRecipe,
    UNetRecipe,
    canonical_json,
    digest_of,
    unset,
)
from diffusion.store.publish import publish, read_checked, sha256_file, staging
from diffusion.store.refs import RunRef
from diffusion.store.text_encoders import encoder_named
from diffusion.text import TextEncoder, TextIdentity

SPEC_NAME = "bundle.json"
WEIGHTS_NAME = "weights.safetensors"
_DAMAGED = (
    "A published checkpoint never changes, so this copy is damaged: delete its folder and run `diffusion train` again, it"
    " goes on from the one before it."
)

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class BundleSpec(Frozen):
    """bundle.json: how to build the network, how to draw with it, and which run, recipe and data it came from."""

    format: Literal[1] = 1
    classes: tuple[str, ...] = Field(min_length=1, description="Name of each label; the null label comes after them")
    resolution: int = Field(ge=8, description="Side of the square picture, pixels")
    unet: UNetRecipe
    text: TextIdentity | None = Field(None, exclude_if=unset, description="What reads captions; absent: nothing does")
    degradations: tuple[TaskName, ...] = Field(
        (), exclude_if=unset, description="What it was trained to restore; absent: nothing"
    )
    sigma_data: float = Field(gt=0)
    prediction: PredictionName = "edm"
    precision: Literal["bf16", "fp32"]
    ema: float = Field(gt=0, description="Relative width of the average that the weights are")
    sampling: SamplingRecipe = Field(description="How a picture is drawn when a request does not say")
    parameters: int = Field(ge=1, description="Numbers in the weights")
    images_seen: int = Field(ge=1)
    run_digest: Digest
    dataset_digest: Digest
    recipe_digest: Digest
    weights_sha256: Digest

    @model_validator(mode="after")
    def _checks(self) -> "BundleSpec":
        if self.unet.text_width != (self.text.width if self.text else 0):
            raise ValueError(
                f"text={self.text} and unet.text_width={self.unet.text_width}: a network that reads captions is of use"
                f" only with the encoder it was trained on, so its checkpoint must name it: train again"
            )
        return self


@dataclass(frozen=True)
class Bundle:
    """A verified bundle in memory.  Its denoiser is in eval mode and asks for no gradients."""

    spec: BundleSpec
    digest: str
    denoiser: Denoiser
    encoder: TextEncoder | None = None  # of spec.text


def bundle_path(store_root: Path, digest: str) -> Path:
    """Where the bundle of this digest is published."""
    return Path(store_root) / "bundles" / digest[:16]


def export_bundle(run: RunRef, ema_sigma_rel: float, store_root: Path, sampling: SamplingRecipe) -> tuple[str, str]:
    """Publish the bundle of one average of a finished run.  Returns (folder, digest).

    The same run, width and sampling give the same bytes.  Raises ValueError for a checkpoint that is damaged, or not
    this run's, or has no average of that width: raw weights are never served.
    """
    recipe, text, weights = _read_average(run, ema_sigma_rel)
    # contiguous: the file knows no memory formats, and equal weights are to give equal bytes
    data = safetensors.torch.save({name: weight.float().contiguous() for name, weight in weights.items()})
    spec = BundleSpec(
        classes=run.dataset.classes,
        resolution=run.dataset.resolution,
        unet=recipe.unet,
        text=text,
        degradations=recipe.degradations,
        sigma_data=recipe.sigma_data,
        prediction=recipe.prediction,
        precision=recipe.precision,
        ema=ema_sigma_rel,
        sampling=sampling,
        parameters=sum(weight.numel() for weight in weights.values()),
        images_seen=run.images_seen,
        run_digest=run.digest,
        dataset_digest=run.dataset.digest,
        recipe_digest=run.recipe_digest,
        weights_sha256=hashlib.sha256(data).hexdigest(),
    )
    _fill(_build(spec), weights, source=run.uri)
    with staging(Path(store_root) / "bundles") as folder:
        (folder / WEIGHTS_NAME).write_bytes(data)
        (folder / SPEC_NAME).write_bytes(canonical_json(spec))
        return publish_bundle(folder, store_root)


def publish_bundle(folder: Path, store_root: Path) -> tuple[str, str]:
    """Verify the bundle in `folder`, a temporary one on the store's disk, and move it to its place in the store.

    Where that bundle is published already, it is verified instead.  Returns (folder, digest).
    """
    _, digest = verify_bundle(folder)
    final = bundle_path(store_root, digest)
    try:
        publish(folder, final)
    except FileExistsError:
        verify_bundle(final, digest)
    return str(final), digest


def verify_bundle(uri: str | Path, digest: str | None = None) -> tuple[BundleSpec, str]:
    """Check bundle.json and the weights against their digests without loading them.  Returns (spec, digest).

    digest: the one it must have, if known.  Raises ValueError saying which file is missing or wrong.
    """
    spec, actual = _read_spec(Path(uri), digest)
    path = Path(uri, WEIGHTS_NAME)
    _check_weights(path, spec, sha256_file(path))
    return spec, actual


def load_bundle(uri: str | Path, device: str | torch.device = "cpu", *, digest: str | None = None) -> Bundle:
    """Read a bundle, verifying it as `verify_bundle` does, and put its denoiser and its text encoder on `device`.

    Raises ValueError where that encoder is not installed here, or another is.
    """
    spec, actual = _read_spec(Path(uri), digest)
    path = Path(uri, WEIGHTS_NAME)
    data = path.read_bytes()  # hashed and parsed from the same bytes: nothing can change between
    _check_weights(path, spec, hashlib.sha256(data).hexdigest())
    denoiser = _build(spec)
    try:
        weights = safetensors.torch.load(data)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}. Export the bundle again.") from error
    _fill(denoiser, weights, source=str(path))
    denoiser = denoiser.to(device).eval().requires_grad_(False)
    return Bundle(spec, actual, denoiser, encoder_named(spec.text, str(device)) if spec.text else None)


def _read_spec(folder: Path, expected: str | None) -> tuple[BundleSpec, str]:
    path = folder / SPEC_NAME
    for name in (SPEC_NAME, WEIGHTS_NAME):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} is no bundle: it has no {name}. `diffusion evaluate` exports one.")
    data = path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if expected is not None and digest != expected:
        raise ValueError(
            f"{folder} is the bundle {digest[:12]}, not {expected[:12]} that was asked for. A published bundle never"
            f" changes: this is another model's, or damaged. Delete the folder and run the stage again."
        )
    try:
        spec = BundleSpec.model_validate_json(data)
    except ValueError as error:
        raise ValueError(f"{path} is not a bundle of format 1: {error}") from error
    # only what the file says: one written before a field existed has that field's default, and the digest it always had
    if canonical_json(spec.model_dump(mode="json", exclude_unset=True)) != data:
        raise ValueError(f"{path} is not in canonical form, so its digest identifies nothing: it was edited by hand")
    return spec, digest


def _check_weights(path: Path, spec: BundleSpec, actual: str) -> None:
    if actual != spec.weights_sha256:
        raise ValueError(
            f"{path}: sha256 {actual[:12]}, {SPEC_NAME} says {spec.weights_sha256[:12]}. A published bundle never"
            f" changes, so this copy is damaged: delete its folder and run `diffusion evaluate` again."
        )


def _read_average(run: RunRef, ema_sigma_rel: float) -> tuple[TrainRecipe, TextIdentity | None, dict[str, Tensor]]:
    """The recipe, the text encoder and one average out of a run's checkpoint.

    What is read of it is verified, the rest is left alone.
    """
    folder = Path(run.uri)
    path = folder / "manifest.json"
    if not path.is_file():
        raise ValueError(f"{folder} is no checkpoint: it has no {path.name}. Run `diffusion train` again.")
    manifest = json.loads(read_checked(path, run.digest, _DAMAGED))
    name = manifest["ema"].get(repr(ema_sigma_rel))
    if name is None:
        raise ValueError(
            f"{folder} has no average of relative width {ema_sigma_rel}, only {', '.join(manifest['ema']) or 'none'};"
            f" raw weights are never served. Choose one of these with `--set evaluate.ema=...`."
        )
    facts = json.loads(read_checked(folder / "state.json", manifest["files"]["state.json"]["sha256"], _DAMAGED))
    recipe = TrainRecipe.model_validate_json(canonical_json(facts["recipe"]))
    made = (digest_of(facts["recipe"]), facts["dataset"]["digest"], facts["images_seen"])
    if made != (run.recipe_digest, run.dataset.digest, run.images_seen):
        raise ValueError(f"{folder} was made from another recipe, dataset or length than the reference to it says")
    text = TextIdentity.model_validate(facts["text"]) if "text" in facts else None
    return (
        recipe,
        text,
        safetensors.torch.load(read_checked(folder / name, manifest["files"][name]["sha256"], _DAMAGED)),
    )


def _build(spec: BundleSpec) -> Denoiser:
    return denoiser_of(
        spec.unet,
        resolution=spec.resolution,
        classes=len(spec.classes),
        sigma_data=spec.sigma_data,
        precision=spec.precision,
        prediction=spec.prediction,
        image_channels=image_channels(spec.degradations),
    )


@torch.no_grad()
def _fill(denoiser: Denoiser, weights: dict[str, Tensor], *, source: str) -> None:
    """Copy weights by name into the denoiser's parameters: all of them, no others, of equal shape."""
    parameters = dict(denoiser.named_parameters())
    wrong = sorted(parameters.keys() ^ weights.keys()) or [
        name for name, p in parameters.items() if p.shape != weights[name].shape
    ]
    if wrong:
        raise ValueError(f"{source}: weights and U-Net recipe differ in {len(wrong)} tensors, first {wrong[:3]}")
    for name, parameter in parameters.items():
        parameter.copy_(weights[name])
