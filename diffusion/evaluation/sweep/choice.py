"""Which ways of drawing are given up, which are on the front of quality against time, and which one is chosen.

All settings draw from the same seeds and are measured against the same reference, so that two of them are compared by the
jackknife of their difference: what both owe to the seeds and to the number of samples cancels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from diffusion.evaluation.metrics.intervals import half_width, jackknife_error
from diffusion.evaluation.metrics.sample import Distance
from diffusion.guidance import classifier_free
from diffusion.recipe import SamplingRecipe, SweepRecipe
from diffusion.sampler import SAMPLERS, run
from diffusion.spacing import sampling_sigmas


@dataclass(frozen=True)
class Candidate:
    """A setting as far as it is measured.  evaluations: of the network, a picture."""

    number: int  # in the grid
    evaluations: int
    distance: Distance


@dataclass(frozen=True)
class Difference:
    """a - times b of two paired Frechet distances.  `freed`: without the part of it that is of the order of 1 / N."""

    value: float
    freed: float
    standard_error: float
    blocks: int

    @classmethod
    def of(cls, a: Distance, b: Distance, times: float = 1.0) -> "Difference":
        """Delete-a-block jackknife of the difference: its error, and its bias.  [Quenouille 1956; Efron & Stein 1981]"""
        if len(a.left_out) != len(b.left_out):
            raise ValueError(f"{len(a.left_out)} and {len(b.left_out)} blocks: not of the same samples")
        blocks, value = len(a.left_out), a.value - times * b.value
        left_out = [x - times * y for x, y in zip(a.left_out, b.left_out, strict=True)]
        freed = blocks * value - (blocks - 1) * math.fsum(left_out) / blocks
        return cls(value, freed, jackknife_error(left_out), blocks)

    def half_width(self, confidence: float) -> float:
        """Of its two-sided interval."""
        return half_width(self.standard_error, self.blocks - 1, confidence)


def rounds(sweep: SweepRecipe) -> tuple[int, ...]:
    """Samples of each round, ascending: doubled each time, the last `sweep.samples`."""
    counts = [min(sweep.first_samples, sweep.samples)]
    while counts[-1] < sweep.samples:
        counts.append(min(2 * counts[-1], sweep.samples))
    return tuple(counts)


def evaluations_of(sampling: SamplingRecipe) -> int:
    """Rows that the network is asked for one picture, of a class: a guided answer takes two.  Found by asking."""
    asked, x = 0, torch.zeros(1, 1, 1, 1)

    def denoise(x: torch.Tensor, _sigma: torch.Tensor) -> torch.Tensor:
        nonlocal asked
        asked += len(x)
        return torch.zeros_like(x)

    sampler = SAMPLERS[sampling.sampler](x, sampling_sigmas(sampling, sampling.steps), lambda _step: x)
    run(classifier_free(sampler, {}, {}, sampling.guidance, sampling.guidance_interval), denoise)
    return asked


def beaten(candidates: Sequence[Candidate], confidence: float) -> dict[int, int]:
    """Number of each candidate that is worse beyond doubt than one that takes no longer -> number of that one.

    Beyond doubt: its distance, and the same freed of what is due to so few samples, are higher by more than the half-width
    of the difference's interval, of which all that are looked at hold together at `confidence`.  [Bonferroni]
    """
    each = 1 - (1 - confidence) / max(1, len(candidates) - 1)
    found = {}
    for a in candidates:
        for b in sorted(candidates, key=lambda other: (other.distance.value, other.number)):
            if b.number != a.number and b.evaluations <= a.evaluations:
                difference = Difference.of(a.distance, b.distance)
                if min(difference.value, difference.freed) > difference.half_width(each):
                    found[a.number] = b.number
                    break
    return found


def front(candidates: Sequence[Candidate]) -> tuple[int, ...]:
    """Numbers of those that no other equals in time and distance and beats in one, the fastest first.  [Pareto]"""
    kept: list[Candidate] = []
    for one in sorted(candidates, key=lambda c: (c.evaluations, c.distance.value, c.number)):
        if not kept or one.distance.value < kept[-1].distance.value:
            kept.append(one)
    return tuple(one.number for one in kept)


def choice(candidates: Sequence[Candidate], tolerance: float, confidence: float) -> tuple[int, int, bool]:
    """(number of the lowest distance, number of the chosen, whether that is certain).

    Chosen is the fastest, of equally fast ones the lowest, whose distance is with confidence below 1 + tolerance times that
    of each other one: of each, since the lowest as measured need not be the lowest.  Where that can be said of none, the
    lowest as measured, and it is not certain.
    """
    best = min(candidates, key=lambda c: (c.distance.value, c.evaluations, c.number))

    def fits(one: Candidate) -> bool:
        excesses = (
            Difference.of(one.distance, o.distance, 1 + tolerance) for o in candidates if o.number != one.number
        )
        return all(excess.value + excess.half_width(confidence) < 0 for excess in excesses)

    fit = sorted(filter(fits, candidates), key=lambda c: (c.evaluations, c.distance.value, c.number))
    return best.number, (fit or [best])[0].number, bool(fit)
