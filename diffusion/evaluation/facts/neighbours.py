"""Kernel distance, precision, recall, density and coverage in the report, with identity and intervals."""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffusion.evaluation.facts.distance import jackknifed_facts
from diffusion.evaluation.gathered import Gathered
from diffusion.evaluation.identity import SampleIdentity, sample_identity
from diffusion.evaluation.metrics.intervals import CONFIDENCE, digits
from diffusion.evaluation.metrics.kernel import kernel_distance, mean_within
from diffusion.evaluation.metrics.manifold import K_DENSITY, Estimate, Real, neighbourhood
from diffusion.evaluation.metrics.pairs import Picked
from diffusion.evaluation.metrics.sample import Distance
from diffusion.evaluation.metrics.splits import split
from diffusion.evaluation.plan import evenly
from diffusion.recipe import Frozen

if TYPE_CHECKING:
    from diffusion.evaluation.report.report import Report

LIMIT = 10_000  # pictures of either kind, evenly spaced: every pair is looked at
LEAST = 2 * (K_DENSITY + 3)  # of either kind, below which nothing is measured

_TITLE = "## Precision, recall, density, coverage"


class Kernel(Frozen):
    """The unbiased squared kernel distance, its standard error and its interval over samples of any size."""

    identity: SampleIdentity
    value: float  # a difference of means: may lie below 0
    standard_error: float
    left_out: tuple[float, ...]  # without each of the Frechet distance's blocks in turn
    confidence: float
    low: float
    high: float

    @classmethod
    def of(cls, distance: Distance, identity: SampleIdentity) -> "Kernel":
        return cls(identity=identity, **jackknifed_facts(distance, least=-math.inf))


class Measured(Frozen):
    """A number with its standard error and interval over samples of that size; `real`: what real pictures score."""

    value: float
    standard_error: float
    low: float
    high: float
    real: float

    @classmethod
    def of(cls, estimate: Estimate, interval: tuple[float, float], real: Estimate) -> "Measured":
        return cls(
            value=digits(estimate.value),
            standard_error=digits(estimate.standard_error),
            low=digits(interval[0]),
            high=digits(interval[1]),
            real=digits(real.value),
        )


class Neighbours(Frozen):
    """Whether the drawn pictures look like real ones (precision, density) and show all that these show (recall, coverage).

    `real_pictures` of the real ones, against the `real_against` others, score what is called `real`.
    """

    identity: SampleIdentity
    confidence: float
    precision: Measured
    recall: Measured
    density: Measured
    coverage: Measured
    real_pictures: int
    real_against: int

    @property
    def measured(self) -> dict[str, Measured]:
        return {name: getattr(self, name) for name in ("precision", "recall", "density", "coverage")}


def kernel_of(gathered: Gathered) -> Kernel | None:
    """The kernel distance of the drawn pictures from the real ones; None where there are none, or too few."""
    if (chosen := _chosen(gathered)) is None:
        return None
    drawn, real, _ = chosen
    labels = gathered.drawn_labels[drawn.places]
    identity = sample_identity(gathered, "kernel/1", samples=len(drawn), reference_pictures=len(real))
    return Kernel.of(kernel_distance(drawn, real, within=mean_within(real), labels=labels), identity)


def neighbours_of(gathered: Gathered) -> Neighbours | None:
    """The four numbers of the drawn pictures; None where there are none, or too few."""
    if (chosen := _chosen(gathered)) is None:
        return None
    drawn, real, labels = chosen
    found = neighbourhood(drawn, Real.of(real))
    some = split(labels, min(len(drawn), len(real) // 2), seed=gathered.recipe.seed, splits=1)[0]
    one, other = (Picked(gathered.real, real.places[chosen]) for chosen in (some, ~some))
    honest = neighbourhood(one, Real.of(other))
    identity = sample_identity(gathered, "neighbours/1", samples=len(drawn), reference_pictures=len(real))
    return Neighbours(
        identity=identity,
        confidence=CONFIDENCE,
        precision=Measured.of(found.precision, found.precision.share_interval(CONFIDENCE), honest.precision),
        recall=Measured.of(found.recall, found.recall.share_interval(CONFIDENCE), honest.recall),
        density=Measured.of(found.density, found.density.mean_interval(CONFIDENCE), honest.density),
        coverage=Measured.of(found.coverage, found.coverage.share_interval(CONFIDENCE), honest.coverage),
        real_pictures=int(some.sum()),
        real_against=int((~some).sum()),
    )


def at_most(features: Tensor, rows: Tensor | None = None) -> Picked:
    """LIMIT of the features (N, D), evenly spaced; all, if fewer.  rows: only of these, int64."""
    rows = torch.arange(len(features)) if rows is None else rows
    return Picked(features, rows[list(evenly(len(rows), LIMIT))])


def _chosen(gathered: Gathered) -> tuple[Picked, Picked, Tensor] | None:
    """Features of the drawn and the real pictures that are measured, and the labels of the latter."""
    if gathered.drawn is None or min(len(gathered.drawn), len(gathered.real)) < LEAST:
        return None
    drawn, real = at_most(gathered.drawn), at_most(gathered.real)
    return drawn, real, gathered.real_labels[real.places]


def neighbour_words(report: "Report") -> list[str]:
    """Both for people."""
    found, kernel = report.neighbours, report.kernel
    if found is None or kernel is None:
        if report.problems:
            why = "the model gave no pictures"
        else:
            why = f"it takes {LEAST} drawn and {LEAST} training pictures (`evaluate.samples`)"
        return [_TITLE, f"Not measured: {why}."]
    rows = [
        f"| | this model | {found.confidence:.0%} interval | real pictures in their place |",
        "|---|---|---|---|",
        *(
            f"| {name} | **{each.value:.3f}** | {each.low:.3f} to {each.high:.3f} | {each.real:.3f} |"
            for name, each in found.measured.items()
        ),
        f"| kernel distance | **{kernel.value:.4g}** | {kernel.low:.4g} to {kernel.high:.4g} | 0 in the mean |",
    ]
    notes = (
        f"Higher is better but for the kernel distance; {found.identity.samples:,} samples against"
        f" {found.identity.reference_pictures:,} training pictures, in the features of the Frechet distance. **Precision**:"
        f" the share of samples that lie among real pictures. **Recall**: the share of real pictures that lie among samples."
        f" **Density**: how crowded with real pictures the places of the samples are, about 1 where they are the same."
        f" **Coverage**: the share of real pictures with a sample in their neighbourhood; a model that leaves something out"
        f" has a low one, however good each sample is. Recall and coverage depend on the number of samples, so compare"
        f" them with the last column ({found.real_pictures:,} training pictures against the {found.real_against:,} others)"
        f" and with numbers of equal identity. The **kernel distance** has no such dependence. The intervals are over"
        f" samples of that size; the real pictures are taken as given."
    )
    return [_TITLE, "\n".join(rows), notes]
