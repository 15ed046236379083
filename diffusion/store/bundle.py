"""The bundle: all that serving needs and nothing else.  Averaged weights as safetensors, and bundle.json, whose sha256
is the model's digest.  There is no pickle in it, and no raw weights."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import safetensors.torch
import torch
from pydantic import Field, ValidationError, model_validator
from safetensors import SafetensorError
from torch import Tensor

from diffusion.codec import Codec, CodecIdentity
from diffusion.data.images import to_uint8
from diffusion.degradation import image_channels
from diffusion.denoiser import Denoiser, denoiser_of
from diffusion.ema import Snapshot
from diffusion.recipe import (
    Frozen,
    GuidanceKind,
    Lesson,
    PredictionName,
    SamplingRecipe,
    TaskName,
    UNetRecipe,
    canonical_json,
    first_mistake,
    unset,
)
from diffusion.store.averages import Average, Digest, Reconstruction, Source, read_average, read_recipe
from diffusion.store.codecs import codec_named
from diffusion.store.publish import publish, sha256_file, staging
from diffusion.store.refs import RunRef
from diffusion.store.text_encoders import encoder_named
from diffusion.text import TextEncoder, TextIdentity

SPEC_NAME = "bundle.json"
WEIGHTS_NAME = "weights.safetensors"
GUIDE_NAME = "guide.safetensors"
_AGAIN = "Delete its folder and run `diffusion evaluate` again."


class Guide(Frozen):
    """The second network of a bundle, which autoguidance leads away from: the same run, less trained or averaged else."""

    checkpoint: Source
    ema: float = Field(gt=0, description="Relative width of the average that the weights are")
    reconstruction: Reconstruction | None = Field(
        None, exclude_if=unset, description="Absent: the run kept that average"
    )
    weights_sha256: Digest


class BundleSpec(Frozen):
    """bundle.json: how to build the network, how to draw with it, and which run, recipe and data it came from."""

    format: Literal[1] = 1
    classes: tuple[str, ...] = Field(min_length=1, description="Name of each label; the null label comes after them")
    resolution: int = Field(ge=8, description="Side of the square picture, pixels")
    sizes: tuple[tuple[int, int], ...] = Field(
        (), exclude_if=unset, description="Height and width of the training pictures; absent: the square's"
    )
    unet: UNetRecipe
    text: TextIdentity | None = Field(None, exclude_if=unset, description="What reads captions; absent: nothing does")
    codec: CodecIdentity | None = Field(
        None,
        exclude_if=unset,
        description="What makes pictures of the latents it draws; absent: it draws pictures",
    )
    degradations: tuple[TaskName, ...] = Field(
        (), exclude_if=unset, description="What it was trained to restore; absent: nothing"
    )
    sigma_data: float = Field(gt=0)
    prediction: PredictionName = "edm"
    precision: Literal["bf16", "fp32"]
    ema: float = Field(gt=0, description="Relative width of the average that the weights are")
    reconstruction: Reconstruction | None = Field(
        None, exclude_if=unset, description="Absent: the run kept that average"
    )
    guide: Guide | None = Field(None, exclude_if=unset, description="A worse model, for autoguidance")
    lesson: Lesson | None = Field(
        None, exclude_if=unset, description="Of a few-step student: by whom it was taught, and for which steps"
    )
    sampling: SamplingRecipe = Field(description="How a picture is drawn when a request does not say")
    parameters: int = Field(ge=1, description="Numbers in the weights")
    images_seen: int = Field(ge=1)
    init: Digest | None = Field(
        None, exclude_if=unset, description="The model whose weights its run started from, if any"
    )
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
        if self.codec:
            self.codec.side(self.resolution)
        if self.sampling.guidance_kind not in self.guidance_kinds:
            raise ValueError("sampling.guidance_kind=autoguidance, and there is no guide: evaluate with guide_images")
        if self.lesson and self.sampling != self.lesson.student:
            raise ValueError(
                "a student answers at the noise levels it was taught for alone: evaluate it as its lesson.student draws"
            )
        return self

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of a picture where a request does not say: of what it was trained on the nearest to the square."""
        square = (self.resolution, self.resolution)
        return min(self.sizes, key=lambda size: (max(size) / min(size), size)) if self.sizes else square

    def shape_at(self, size: tuple[int, int] | None = None) -> tuple[int, int, int]:
        """(C, H, W) of what the network sees and draws, of pictures of this (height, width): the picture, or its latents."""
        height, width = size or self.size
        if self.codec is None:
            return 3, height, width
        return self.codec.channels, self.codec.side(height), self.codec.side(width)

    @property
    def guidance_kinds(self) -> tuple[GuidanceKind, ...]:
        """What a request may choose from."""
        return ("classifier_free", "autoguidance") if self.guide else ("classifier_free",)

    @property
    def weights(self) -> dict[str, str]:
        """File of each network's weights -> sha256, the model's first."""
        return {WEIGHTS_NAME: self.weights_sha256} | ({GUIDE_NAME: self.guide.weights_sha256} if self.guide else {})


@dataclass(frozen=True)
class Bundle:
    """A verified bundle in memory.  Its denoisers are in eval mode and ask for no gradients."""

    spec: BundleSpec
    digest: str
    denoiser: Denoiser
    encoder: TextEncoder | None = None  # of spec.text
    guide: Denoiser | None = None  # of spec.guide
    codec: Codec | None = None  # of spec.codec

    def pictures(self, x0: Tensor) -> Tensor:
        """What was drawn, (B, C, H, W) -> uint8 (B, H, W, 3), each picture with the bits it would have alone.

        Raises ValueError where a value is not finite.
        """
        return to_uint8((self.codec.decode(x0) if self.codec else x0).cpu())


def bundle_path(store_root: Path, digest: str) -> Path:
    """Where the bundle of this digest is published."""
    return Path(store_root) / "bundles" / digest[:16]


def export_bundle(
    run: RunRef, ema_sigma_rel: float, store_root: Path, sampling: SamplingRecipe, guide: Snapshot | None = None
) -> tuple[str, str]:
    """Publish the bundle of one average of a finished run, with that of `guide` beside it.  Returns (folder, digest).

    The same run, averages and sampling give the same bytes.  Raises ValueError for a checkpoint that is damaged, or not
    this run's, or an average that `read_average` cannot give: raw weights are never served.
    """
    recipe, text, codec = read_recipe(run)
    model = read_average(run, Snapshot(run.images_seen, ema_sigma_rel))
    data = {WEIGHTS_NAME: _packed(model)}
    second = None
    if guide is not None:
        worse = read_average(run, guide)
        data[GUIDE_NAME] = _packed(worse)
        second = Guide(
            checkpoint=worse.checkpoint,
            ema=guide.sigma_rel,
            reconstruction=worse.reconstruction,
            weights_sha256=hashlib.sha256(data[GUIDE_NAME]).hexdigest(),
        )
    spec = BundleSpec(
        classes=run.dataset.classes,
        resolution=run.dataset.resolution,
        sizes=run.dataset.sizes,
        unet=recipe.unet,
        text=text,
        codec=codec,
        degradations=recipe.degradations,
        sigma_data=recipe.sigma_data,
        prediction=recipe.prediction,
        precision=recipe.precision,
        lesson=recipe.lesson,
        ema=ema_sigma_rel,
        reconstruction=model.reconstruction,
        guide=second,
        sampling=sampling,
        parameters=sum(weight.numel() for weight in model.weights.values()),
        images_seen=run.images_seen,
        init=recipe.init,
        run_digest=run.digest,
        dataset_digest=run.dataset.digest,
        recipe_digest=run.recipe_digest,
        weights_sha256=hashlib.sha256(data[WEIGHTS_NAME]).hexdigest(),
    )
    with staging(Path(store_root) / "bundles") as folder:
        for name, content in data.items():
            _network(spec, content, source=run.uri)
            (folder / name).write_bytes(content)
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
    spec, actual = read_spec(Path(uri), digest)
    for name, expected in spec.weights.items():
        _check_weights(Path(uri, name), expected, sha256_file(Path(uri, name)))
    return spec, actual


def load_bundle(uri: str | Path, device: str | torch.device = "cpu", *, digest: str | None = None) -> Bundle:
    """Read a bundle, verifying it as `verify_bundle` does, and put its denoisers, its text encoder and its codec on
    `device`.

    Raises ValueError where that encoder or codec is not installed here, or another is.
    """
    spec, actual = read_spec(Path(uri), digest)
    denoisers = [_read_network(spec, Path(uri, name)).to(device) for name in spec.weights]
    encoder = encoder_named(spec.text, str(device)) if spec.text else None
    codec = codec_named(spec.codec, str(device)) if spec.codec else None
    return Bundle(spec, actual, denoisers[0], encoder, *denoisers[1:], codec=codec)


def load_model(uri: str | Path, *, digest: str | None = None) -> tuple[BundleSpec, Denoiser]:
    """Of a bundle, verified, the specification and the model alone, on the CPU: what reads its captions or makes its latents
    need not be installed."""
    spec, _ = read_spec(Path(uri), digest)
    return spec, _read_network(spec, Path(uri, WEIGHTS_NAME))


def _read_network(spec: BundleSpec, path: Path) -> Denoiser:
    data = path.read_bytes()  # hashed and parsed from the same bytes: nothing can change between
    _check_weights(path, spec.weights[path.name], hashlib.sha256(data).hexdigest())
    return _network(spec, data, source=str(path)).eval().requires_grad_(False)


def read_spec(folder: Path, expected: str | None) -> tuple[BundleSpec, str]:
    """The facts of the bundle in a folder, without its weights, and its digest.  Raises ValueError where it is not the
    expected one.
    """
    spec, digest = read_facts(folder, expected)
    _check_there(folder, *spec.weights)
    return spec, digest


def read_facts(folder: Path, expected: str | None) -> tuple[BundleSpec, str]:
    """Likewise of a folder that may have bundle.json alone."""
    path = folder / SPEC_NAME
    _check_there(folder, SPEC_NAME)
    data = path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if expected is not None and digest != expected:
        raise ValueError(
            f"{folder} is the bundle {digest[:12]}, not {expected[:12]} that was asked for. A published bundle never"
            f" changes: this is another model's, or damaged. Delete the folder and run the stage again."
        )
    try:
        spec = BundleSpec.model_validate_json(data)
    except ValidationError as error:
        raise ValueError(f"{path} is not a bundle of format 1: {first_mistake(error)}. {_AGAIN}") from error
    # only what the file says: one written before a field existed has that field's default, and the digest it always had
    if canonical_json(spec.model_dump(mode="json", exclude_unset=True)) != data:
        raise ValueError(
            f"{path} is not in canonical form, so its digest identifies nothing: it was edited by hand. {_AGAIN}"
        )
    return spec, digest


def _check_there(folder: Path, *names: str) -> None:
    for name in names:
        if not (folder / name).is_file():
            raise ValueError(f"{folder} is no bundle: it has no {name}. `diffusion evaluate` exports one.")


def _check_weights(path: Path, expected: str, actual: str) -> None:
    if actual != expected:
        raise ValueError(
            f"{path}: sha256 {actual[:12]}, {SPEC_NAME} says {expected[:12]}. A published bundle never"
            f" changes, so this copy is damaged. {_AGAIN}"
        )


def _packed(average: Average) -> bytes:
    # contiguous: the file knows no memory formats, and equal weights are to give equal bytes
    return safetensors.torch.save({name: weight.float().contiguous() for name, weight in average.weights.items()})


def _network(spec: BundleSpec, data: bytes, *, source: str) -> Denoiser:
    """The denoiser of the specification with these weights, a safetensors file's bytes."""
    channels, side, _ = spec.shape_at((spec.resolution, spec.resolution))
    denoiser = denoiser_of(
        spec.unet,
        resolution=side,
        channels=channels,
        classes=len(spec.classes),
        sigma_data=spec.sigma_data,
        precision=spec.precision,
        prediction=spec.prediction,
        image_channels=image_channels(spec.degradations),
    )
    try:
        weights = safetensors.torch.load(data)
    except SafetensorError as error:
        raise ValueError(f"{source} is not a safetensors file: {error}. Export the bundle again.") from error
    _fill(denoiser, weights, source=source)
    return denoiser


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
