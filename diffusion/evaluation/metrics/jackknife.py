"""The standard error of a statistic of a sample in blocks, from its values without one and without two of them."""

import math
from collections.abc import Sequence

from diffusion.evaluation.metrics.intervals import jackknife_error

BLOCKS = 32
PAIRS = tuple((block, BLOCKS - 1 - block) for block in range(BLOCKS // 2))  # as far apart in the order as blocks are
TAKEN = 0.75


def error_by_pairs(values: Sequence[float]) -> float:
    """The standard error of the first, from those without each block and without each of PAIRS.

    The jackknife counts what products of two samples add to the variance twice.  [Efron & Stein 1981]  That is known from
    pairs of blocks, and TAKEN of it taken off: the difference of two uncertain variances is less certain than Student's t of
    so many blocks allows for, and with all of it taken off intervals hold their value in 90 % of cases for 64 pictures.
    """
    value, left_out, pairs = values[0], values[1 : 1 + BLOCKS], values[1 + BLOCKS :]
    found = jackknife_error(left_out) ** 2
    return math.sqrt(found - TAKEN * min(of_pairs(value, left_out, pairs), found / 2))


def of_pairs(value: float, left_out: Sequence[float], pairs: Sequence[float]) -> float:
    """V2, what products of two samples add to the variance, from the values without each block and without each of PAIRS.

    Differences in which constants, and what is of one block alone, vanish.  [Efron & Stein 1981, sec. 5]  About their mean,
    which is of the bias: it would vanish too if that fell as 1 / N, but with fewer pictures than features it does not.
    """
    differences = [
        BLOCKS * value - (BLOCKS - 1) * (left_out[a] + left_out[b]) + (BLOCKS - 2) * without
        for (a, b), without in zip(PAIRS, pairs, strict=True)
    ]
    mean = math.fsum(differences) / len(PAIRS)
    variance = math.fsum((each - mean) ** 2 for each in differences) / (len(PAIRS) - 1)
    return variance * (BLOCKS - 1) / (2 * BLOCKS)
