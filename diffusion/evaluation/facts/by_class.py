"""The classes one by one, in numbers that few pictures can carry: no Frechet distance, whose bias goes by 1/N."""

import math
from typing import TYPE_CHECKING

import numpy as np

from diffusion.evaluation.facts.neighbours import at_most
from diffusion.evaluation.gathered import Gathered
from diffusion.evaluation.identity import SampleIdentity, sample_identity
from diffusion.evaluation.metrics.intervals import CONFIDENCE, digits, half_width
from diffusion.evaluation.metrics.kernel import kernel_distance, mean_within
from diffusion.evaluation.metrics.manifold import K_DENSITY, Real, neighbourhood
from diffusion.evaluation.metrics.pairs import Features
from diffusion.recipe import Frozen

if TYPE_CHECKING:
    from diffusion.evaluation.report.report import Report

LEAST = 2 * (K_DENSITY + 1)  # drawn and real pictures of a class, below which these are not measured
LEAST_HELD_OUT = 5


class Interval(Frozen):
    """A number with its interval over as many pictures; None where there are too few, or it is not finite."""

    value: float
    low: float
    high: float


class ClassFacts(Frozen):
    """One class: its drawn beside its training pictures, as many as are compared, and the loss on its held-out ones."""

    label: str
    drawn: int
    training: int
    held_out: int  # on which the loss is measured
    kernel: Interval | None
    coverage: Interval | None
    loss: Interval | None  # weighted denoising loss, mean over the recipe's noise levels and then over pictures


class ByClass(Frozen):
    """All classes of the data.  The intervals hold for each class by itself."""

    identity: SampleIdentity
    confidence: float
    classes: tuple[ClassFacts, ...]


def by_class_of(gathered: Gathered) -> ByClass | None:
    """None of data of one class, or where the model gave no pictures."""
    names = gathered.manifest.classes
    if len(names) < 2 or gathered.drawn is None:
        return None
    losses, labels = _losses(gathered)
    facts = []
    for label, name in enumerate(names):
        drawn = at_most(gathered.drawn, (gathered.drawn_labels == label).nonzero().flatten())
        real = at_most(gathered.real, (gathered.real_labels == label).nonzero().flatten())
        measured = min(len(drawn), len(real)) >= LEAST
        own = losses[labels == label]
        facts.append(
            ClassFacts(
                label=name,
                drawn=len(drawn),
                training=len(real),
                held_out=len(own),
                kernel=_kernel(drawn, real) if measured else None,
                coverage=_coverage(drawn, real) if measured else None,
                loss=_mean(own) if len(own) >= LEAST_HELD_OUT else None,
            )
        )
    identity = sample_identity(
        gathered, "classes/1", samples=len(gathered.drawn), reference_pictures=len(gathered.real)
    )
    return ByClass(identity=identity, confidence=CONFIDENCE, classes=tuple(facts))


def _losses(gathered: Gathered) -> tuple[np.ndarray, np.ndarray]:
    """Of each measured held-out picture its loss, the mean over all noise levels, and its label; (N,) each."""
    results = [result.arrays for _, result in gathered.of("loss")]
    if not results:
        return np.empty(0), np.empty(0, np.int64)
    return np.mean([arrays["loss"] for arrays in results], axis=0), results[0]["label"]


def _mean(losses: np.ndarray) -> Interval | None:
    return _around(float(losses.mean()), float(losses.std(ddof=1)) / math.sqrt(len(losses)), len(losses))


def _kernel(drawn: Features, real: Features) -> Interval | None:
    found = kernel_distance(drawn, real, within=mean_within(real))
    return _around(found.value, found.standard_error, len(found.left_out))


def _coverage(drawn: Features, real: Features) -> Interval:
    found = neighbourhood(drawn, Real.of(real)).coverage
    low, high = found.share_interval(CONFIDENCE)
    return Interval(value=digits(found.value), low=digits(low), high=digits(high))


def _around(value: float, error: float, parts: int) -> Interval | None:
    """Student's interval of a number whose standard error comes of so many parts."""
    if not math.isfinite(value):
        return None
    half = half_width(error, parts - 1)
    return Interval(value=digits(value), low=digits(value - half), high=digits(value + half))


def class_words(report: "Report") -> list[str]:
    """The classes for people."""
    found = report.by_class
    if found is None:
        return []
    rows = [
        "| class | drawn, training, held out | kernel distance | coverage | held-out loss |",
        "|---|---|---|---|---|",
        *(
            f"| {one.label} | {one.drawn:,}, {one.training:,}, {one.held_out:,} |"
            f" {_shown(one.kernel)} | {_shown(one.coverage)} | {_shown(one.loss)} |"
            for one in found.classes
        ),
    ]
    notes = (
        f"Each class's samples beside its own training pictures, in the features of the Frechet distance, with"
        f" {found.confidence:.0%} intervals; a dash where there are fewer than {LEAST} of either (of held-out pictures"
        f" {LEAST_HELD_OUT}). A kernel distance whose"
        f" interval holds 0 shows no difference. Coverage goes by the number of samples: compare it between models, not"
        f" between classes of unlike size. The loss is the mean over the noise levels below. The intervals hold for each"
        f" class by itself: of {len(found.classes)} classes one in twenty misses its own, so look at the others before"
        f" the worst is called bad."
    )
    return ["## By class", "\n".join(rows), notes]


def _shown(interval: Interval | None) -> str:
    return "-" if interval is None else f"{interval.value:.3g} ({interval.low:.3g} to {interval.high:.3g})"
