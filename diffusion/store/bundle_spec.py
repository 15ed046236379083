"""bundle.json: how to build a bundle's networks, how they draw, and which run, recipe and data they came from.  Its sha256
is the model's digest."""

import hashlib
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError, model_validator

from diffusion.codec import CodecIdentity
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
from diffusion.store.averages import Digest, Reconstruction, Source
from diffusion.text import TextIdentity

SPEC_NAME = "bundle.json"
WEIGHTS_NAME = "weights.safetensors"
GUIDE_NAME = "guide.safetensors"
HAD_AGAIN = "`diffusion evaluate` exports it again, and a registered one is fetched when it is asked for"
AGAIN = f"Delete its folder: {HAD_AGAIN}."


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


def bundle_path(store_root: Path, digest: str) -> Path:
    """Where the bundle of this digest is published."""
    return Path(store_root) / "bundles" / digest[:16]


def read_spec(folder: Path, expected: str | None) -> tuple[BundleSpec, str]:
    """The facts of the bundle in a folder, without its weights, and its digest.  Raises ValueError where it is not the
    expected one.
    """
    spec, digest = read_facts(folder, expected)
    check_there(folder, *spec.weights)
    return spec, digest


def read_facts(folder: Path, expected: str | None) -> tuple[BundleSpec, str]:
    """Likewise of a folder that may have bundle.json alone."""
    path = folder / SPEC_NAME
    check_there(folder, SPEC_NAME)
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
        raise ValueError(f"{path} is not a bundle of format 1: {first_mistake(error)}. {AGAIN}") from error
    # only what the file says: one written before a field existed has that field's default, and the digest it always had
    if canonical_json(spec.model_dump(mode="json", exclude_unset=True)) != data:
        raise ValueError(
            f"{path} is not in canonical form, so its digest identifies nothing: it was edited by hand. {AGAIN}"
        )
    return spec, digest


def check_there(folder: Path, *names: str) -> None:
    for name in names:
        if not (folder / name).is_file():
            raise ValueError(f"{folder} is no bundle: it has no {name}. `diffusion evaluate` exports one.")
