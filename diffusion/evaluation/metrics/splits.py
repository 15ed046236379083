"""Real pictures in the place of drawn ones, the classes in proportion, and what they score there: no model scores less."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion.evaluation.metrics.frechet import Gaussian
from diffusion.evaluation.metrics.sample import beside
from diffusion.random import Stream, bits


@dataclass(frozen=True)
class Floor:
    """What real pictures score in the place of generated ones: `pictures` of them against the `against` others."""

    value: float  # mean over the splits
    spread: float  # standard deviation between the splits
    splits: int
    pictures: int
    against: int


def floor(features: Tensor, labels: Tensor, n: int, *, seed: int, splits: int = 4) -> Floor:
    """The distance of n real pictures (half of all at most) from the other real pictures.

    The distance is too large by about 1/N, so a perfect model scores about this much and not 0.  features (M, D);
    labels (M,) int64: every split takes the classes in proportion, as the generated pictures do.
    """
    n = min(n, len(features) // 2)
    if n < 2:
        raise ValueError(f"{len(features)} real pictures are too few for a floor: at least 4 are needed")
    values = []
    for some in split(labels, n, seed=seed, splits=splits):
        own, others = (mask.nonzero().flatten() for mask in (some, ~some))
        values.append(beside(Gaussian.of_rows(features, others), features, own, blocks=1).left_out()[0])
    mean = math.fsum(values) / splits
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / max(1, splits - 1))
    return Floor(mean, spread, splits, n, len(features) - n)


def split(labels: Tensor, n: int, *, seed: int, splits: int) -> Tensor:
    """Which n pictures stand for drawn ones in each split, (splits, M) bool; labels (M,), the classes in proportion."""
    words = bits(seed, Stream.HOLDOUT, torch.arange(len(labels)), splits)
    chosen = torch.zeros(splits, len(labels), dtype=torch.bool)
    for label, count in enumerate(allocate(labels.bincount().tolist(), n)):
        members = (labels == label).nonzero().flatten()
        for i in range(splits):
            chosen[i, members[words[members, i].argsort(stable=True)[:count]]] = True
    return chosen


def allocate(counts: list[int], n: int) -> list[int]:
    """n pictures over classes in proportion to `counts`, by largest remainder; equal remainders go to the first class."""
    total = sum(counts)
    if total == 0:
        raise ValueError("there are no pictures to take the frequencies of the classes from")
    given = [n * count // total for count in counts]
    by_remainder = sorted(range(len(counts)), key=lambda c: (-(n * counts[c] % total), c))
    for c in by_remainder[: n - sum(given)]:
        given[c] += 1
    return given
