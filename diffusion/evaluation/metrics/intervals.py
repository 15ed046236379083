"""How far to trust a measured number: its standard error from its values without each part, and quantiles of intervals."""

import math
from collections.abc import Sequence
from statistics import NormalDist

CONFIDENCE = 0.95  # of the interval that a report states; the gate states its own


def jackknife_error(left_out: Sequence[float]) -> float:
    """The standard error of a statistic, from its values without each block in turn.  [Efron & Stein 1981]

    Of a difference of two statistics over the same blocks: from the differences, value by value.  Where two models drew from
    the same noise, what the noise does to both is then not held against the one.
    """
    blocks = len(left_out)
    mean = math.fsum(left_out) / blocks
    return math.sqrt((blocks - 1) / blocks * math.fsum((value - mean) ** 2 for value in left_out))


def digits(value: float) -> float | None:
    """A measured number as reports hold it: six significant digits, None where it is not finite."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def half_width(error: float, degrees: int, confidence: float = CONFIDENCE) -> float:
    """Half of Student's interval of a number with this standard error, of so many degrees of freedom; NaN without any."""
    return t_quantile((1 + confidence) / 2, degrees) * error if degrees > 0 else math.nan


def t_quantile(probability: float, degrees: int) -> float:
    """Student's t, by the expansion around the normal quantile: 3 digits from 8 degrees on.  [Abramowitz & Stegun 26.7.5]"""
    z = NormalDist().inv_cdf(probability)
    return (
        z
        + (z**3 + z) / 4 / degrees
        + (5 * z**5 + 16 * z**3 + 3 * z) / 96 / degrees**2
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384 / degrees**3
        + (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160 / degrees**4
    )
