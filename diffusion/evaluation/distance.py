"""The Frechet distance in the report, with its identity and interval, and what real pictures score in its place."""

from typing import Literal

from pydantic import Field

from diffusion.evaluation.features import ExtractorIdentity
from diffusion.evaluation.gathered import Gathered
from diffusion.evaluation.stats import CONFIDENCE, Distance, Floor, Gaussian, digits, floor, frechet_to, t_quantile
from diffusion.recipe import Frozen, SamplingRecipe, unset


class FrechetIdentity(Frozen):
    """What must be equal for two Frechet distances to be compared: everything but the model."""

    metric: Literal["frechet/1"] = "frechet/1"
    dataset_digest: str
    reference_split: Literal["train"] = "train"
    reference_pictures: int
    extractor: ExtractorIdentity
    dimensions: int  # numbers per picture
    samples: int
    labels: Literal["in the frequencies of the data"] = "in the frequencies of the data"
    captions: Literal["of training pictures of the class"] | None = Field(
        None, exclude_if=unset
    )  # None: read by nothing
    sampling: SamplingRecipe
    batch_size: int
    seed: int


class Frechet(Frozen):
    """A Frechet distance, its jackknife standard error and its interval over samples of that size."""

    identity: FrechetIdentity
    value: float
    standard_error: float
    left_out: tuple[
        float, ...
    ]  # without each of the jackknife's blocks in turn: two models' are compared block by block
    confidence: float
    low: float
    high: float

    @property
    def blocks(self) -> int:
        return len(self.left_out)

    @classmethod
    def of(cls, distance: Distance, identity: FrechetIdentity) -> "Frechet":
        half = t_quantile((1 + CONFIDENCE) / 2, len(distance.left_out) - 1) * distance.standard_error
        return cls(
            identity=identity,
            value=digits(distance.value),
            standard_error=digits(distance.standard_error),
            left_out=tuple(digits(value) for value in distance.left_out),
            confidence=CONFIDENCE,
            low=digits(max(0.0, distance.value - half)),
            high=digits(distance.value + half),
        )


class FloorFacts(Frozen):
    """What real pictures score in the place of generated ones, with the same extractor.  See `stats.floor`."""

    value: float
    spread: float
    splits: int
    pictures: int
    against: int

    @classmethod
    def of(cls, least: Floor) -> "FloorFacts":
        return cls(
            value=digits(least.value),
            spread=digits(least.spread),
            splits=least.splits,
            pictures=least.pictures,
            against=least.against,
        )


def frechet_of(gathered: Gathered) -> Frechet | None:
    """The distance of the drawn pictures from the real ones; None where there are none."""
    if gathered.drawn is None:
        return None
    recipe, real = gathered.recipe, gathered.real
    identity = FrechetIdentity(
        dataset_digest=gathered.manifest.digest,
        reference_pictures=len(real),
        extractor=gathered.setup.extractor,
        dimensions=real.shape[1],
        samples=recipe.samples,
        captions="of training pictures of the class" if gathered.spec.text is not None else None,
        sampling=recipe.sampling,
        batch_size=recipe.batch_size,
        seed=recipe.seed,
    )
    return Frechet.of(frechet_to(Gaussian.of(real), gathered.drawn), identity)


def floor_of(gathered: Gathered) -> FloorFacts | None:
    """What as many real pictures score; None where there are too few."""
    recipe = gathered.recipe
    if len(gathered.real) < 4:
        return None
    return FloorFacts.of(floor(gathered.real, gathered.real_labels, recipe.samples, seed=recipe.seed))
