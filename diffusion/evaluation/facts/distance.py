"""The Frechet distance in the report, with its identity and interval, and what real pictures score in its place."""

import math

from diffusion.evaluation.gathered import Gathered
from diffusion.evaluation.identity import SampleIdentity, sample_identity
from diffusion.evaluation.metrics.extrapolate import LEAST, Extrapolated, extrapolate
from diffusion.evaluation.metrics.frechet import Gaussian
from diffusion.evaluation.metrics.intervals import CONFIDENCE, digits, half_width
from diffusion.evaluation.metrics.jackknife import BLOCKS
from diffusion.evaluation.metrics.sample import Distance, Sample, beside, jackknifed
from diffusion.evaluation.metrics.splits import Floor, floor
from diffusion.recipe import Frozen


class Frechet(Frozen):
    """A Frechet distance, its jackknife standard error and its interval over samples of that size."""

    identity: SampleIdentity
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
    def of(cls, distance: Distance, identity: SampleIdentity) -> "Frechet":
        return cls(identity=identity, **jackknifed_facts(distance, least=0.0))


def jackknifed_facts(distance: Distance, *, least: float) -> dict:
    """A distance with its jackknife as a report states it, its interval cut at the least value that there is."""
    half = half_width(distance.standard_error, len(distance.left_out) - 1)
    return {
        "value": digits(distance.value),
        "standard_error": digits(distance.standard_error),
        "left_out": tuple(digits(value) for value in distance.left_out),
        "confidence": CONFIDENCE,
        "low": digits(max(least, distance.value - half)),
        "high": digits(distance.value + half),
    }


class FrechetLimit(Frozen):
    """The Frechet distance of infinitely many samples.  See `extrapolate`."""

    identity: SampleIdentity
    value: float
    standard_error: float
    doubt: float
    confidence: float
    low: float
    high: float

    @classmethod
    def of(cls, found: Extrapolated, identity: SampleIdentity) -> "FrechetLimit":
        half = math.hypot(half_width(found.standard_error, BLOCKS - 1), found.doubt)
        return cls(
            identity=identity,
            value=digits(max(0.0, found.value)),
            standard_error=digits(found.standard_error),
            doubt=digits(found.doubt),
            confidence=CONFIDENCE,
            low=digits(max(0.0, found.value - half)),
            high=digits(max(0.0, found.value + half)),
        )


class FloorFacts(Frozen):
    """What real pictures score in the place of generated ones, with the same extractor.  See `splits.floor`."""

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


def frechet_of(gathered: Gathered) -> tuple[Frechet | None, FrechetLimit | None]:
    """The distance of the drawn pictures from the real ones, and that of ever more; None where there are none or too few."""
    if gathered.drawn is None:
        return None, None
    real = gathered.real
    identity = sample_identity(gathered, "frechet/1", samples=len(gathered.drawn), reference_pictures=len(real))
    return distances(beside(Gaussian.of(real), gathered.drawn), identity)


def distances(sample: Sample, identity: SampleIdentity) -> tuple[Frechet, FrechetLimit | None]:
    """Of a sample beside its reference."""
    if len(sample) < LEAST:
        return Frechet.of(jackknifed(sample), identity), None
    distance, limit = extrapolate(sample)
    return Frechet.of(distance, identity), FrechetLimit.of(
        limit, identity.model_copy(update={"metric": "frechet-limit/2"})
    )


def floor_of(gathered: Gathered) -> FloorFacts | None:
    """What as many real pictures score; None where there are too few."""
    recipe = gathered.recipe
    if len(gathered.real) < 4:
        return None
    return FloorFacts.of(floor(gathered.real, gathered.real_labels, recipe.samples, seed=recipe.seed))
