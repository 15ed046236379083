"""The Frechet distance of infinitely many samples, from that of N and of its parts.

The distance of N samples is too large by a / N + b / N^2 + ...  [Chong & Forsyth 2020, FID_inf, who fit the first term to
distances at several N.]  From those of N, N/2, N/4 and N/8 samples - each part in turn, so that every sample counts at each
size - Richardson's scheme takes off three terms, which matter where there are fewer samples than features.  Of features of
emoji by EfficientNet each term changed the result by about 0.4 of what the one before did; so all that are left change it
by about two thirds of what the third one did, which is stated as a doubt.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from diffusion.evaluation.metrics.intervals import jackknife_error
from diffusion.evaluation.metrics.sample import BLOCKS, Distance, Sample

PARTS = (1, 2, 4, 8)
LEAST = 2 * BLOCKS  # samples, below which an eighth has less than 8
CUBIC = (64 / 21, -56 / 21, 14 / 21, -1 / 21)  # weights of the distances at N over PARTS: exact for 3 terms
QUADRATIC = (8 / 3, -2.0, 1 / 3, 0.0)  # for 2


@dataclass(frozen=True)
class Extrapolated:
    """The limit, and what the parts say of the distance's own error."""

    value: float  # may be below 0 by its error
    standard_error: float
    doubt: float  # what the terms that are left may change
    distance_error: float  # standard error of the distance at N


def extrapolate(sample: Sample, distance: Distance) -> Extrapolated:
    """distance: `jackknifed` of the sample, of at least LEAST pictures, in BLOCKS blocks.

    Both errors are of the jackknife, which counts what products of two samples add to the variance twice, those of three
    three times.  [Efron & Stein 1981]  With V1 of the samples alone and V2 of products at N, it expects V1 + 2 V2 of the
    distance and V1 + 8 V2 of the mean over quarters, so both are known.  Half of V2 is taken off the distance's: all of it
    would state too little where V2 itself is uncertain.  The limit's error is mostly of products: what the jackknife has
    there beside V1 is halved.
    """
    n = len(sample)
    if n < LEAST or len(distance.left_out) != BLOCKS:
        raise ValueError(f"{n} pictures are too few to extrapolate from: draw at least {LEAST}")
    values, left_out = [distance.value], [distance.left_out]
    for parts in PARTS[1:]:
        value, left = _mean_over(sample, parts)
        values.append(value)
        left_out.append(left)
    limit_left_out = [_weighted(CUBIC, each) for each in zip(*left_out, strict=True)]
    found, quarters, of_limit = (jackknife_error(each) ** 2 for each in (left_out[0], left_out[2], limit_left_out))
    products = min(max(0.0, (quarters - found) / (2 * (PARTS[2] - 1))), found / 2)
    alone = found - 2 * products
    value = _weighted(CUBIC, values)
    return Extrapolated(
        value=value,
        standard_error=math.sqrt((of_limit + min(alone, of_limit)) / 2),
        doubt=abs(value - _weighted(QUADRATIC, values)) * 2 / 3,
        distance_error=math.sqrt(found - products / 2),
    )


def _mean_over(sample: Sample, parts: int) -> tuple[float, list[float]]:
    """The mean distance of every parts-th picture, and the same without each block in turn, which is in one part only."""
    found = [sample.left_out(part=part, parts=parts) for part in range(parts)]
    mean = math.fsum(whole for whole, _ in found) / parts
    of_block = ((*found[k % parts], k // parts) for k in range(BLOCKS))
    return mean, [mean + (without[place] - whole) / parts for whole, without, place in of_block]


def _weighted(weights: Sequence[float], values: Sequence[float]) -> float:
    return math.fsum(weight * value for weight, value in zip(weights, values, strict=True))
