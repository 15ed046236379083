"""How large a share of a sample is unlike a control sample, counted at a threshold that the control sample sets.

Of m control values the r-th smallest is the threshold.  A sample that is like them has each value below it with the
probability q ~ Beta(r, m + 1 - r), whatever the distribution; one of which a share c lies below for another reason has it
with c + (1 - c) q.  So the count is a mixture of binomials, and inverting its tails gives an interval that takes both
samples for finite and needs no normality.  [Wilks 1941, tolerance limits; Clopper & Pearson 1934]
"""

import math
from collections.abc import Callable

import numpy as np

_STEPS, _REACH = 400, 40.0  # of the quadrature over logit q: points, standard deviations to either side
_BISECTIONS = 40


def excess(below: int, n: int, *, rank: int, control: int) -> float:
    """The share c in [0, 1) that `below` of n values under the rank-th smallest of `control` values speak for."""
    q = rank / (control + 1)
    return max(0.0, (below / n - q) / (1 - q))


def excess_interval(below: int, n: int, *, rank: int, control: int, confidence: float) -> tuple[float, float]:
    """(low, high): where a share c lies with at least that confidence, half of the doubt on either side.

    low is 0 for a sample that is like the control with a probability of at least (1 + confidence) / 2.  high holds for any
    sample: a bad model's own pictures may be farther off than control ones, and those below then speak of copies alone.
    """
    if not 0 <= below <= n or not 1 <= rank <= control or n < 1:
        raise ValueError(f"{below} of {n} values below the value of rank {rank} of {control}: give 0 <= below <= n")
    doubt = (1 - confidence) / 2
    q, weights = _beta_points(rank, control + 1 - rank)

    def at_least(c: float) -> float:
        """P(count >= below): rises with c."""
        return 1.0 if below == 0 else float(weights @ betainc(below, n - below + 1, c + (1 - c) * q))

    def at_most(c: float) -> float:
        """The most that P(count <= below) can be: where no other value lies below.  Falls with c."""
        return 1.0 if below == n else float(betainc(n - below, below + 1, np.array(1 - c)))

    low = 0.0 if at_least(0.0) > doubt else _crossing(lambda c: at_least(c) > doubt)
    return low, _crossing(lambda c: at_most(c) < doubt)


def betainc(a: float, b: float, x: np.ndarray) -> np.ndarray:
    """The regularised incomplete beta function I_x(a, b), which is P(Binomial(a + b - 1, x) >= a) for whole numbers.

    x float64 in [0, 1], any shape.  By Lentz's continued fraction.  [Numerical Recipes, Sec. 6.4]
    """
    x = np.clip(np.asarray(x, np.float64), 0.0, 1.0)
    swapped = x > (a + 1) / (a + b + 2)  # there the fraction of 1 - I_(1-x)(b, a) converges faster
    z, p, q = np.where(swapped, 1 - x, x), np.where(swapped, b, a), np.where(swapped, a, b)
    with np.errstate(divide="ignore"):
        log_front = p * np.log(z) + q * np.log1p(-z) - _log_beta(a, b) - np.log(p)
    value = np.exp(log_front) * _fraction(p, q, z)
    return np.clip(np.where(swapped, 1 - value, value), 0.0, 1.0)


def _fraction(p: np.ndarray, q: np.ndarray, z: np.ndarray) -> np.ndarray:
    tiny = 1e-300
    c, d = np.ones_like(z), 1 - (p + q) * z / (p + 1)
    d = 1 / np.where(np.abs(d) < tiny, tiny, d)
    result = d.copy()
    for m in range(1, 10_000):
        even = m * (q - m) * z / ((p + 2 * m - 1) * (p + 2 * m))
        odd = -(p + m) * (p + q + m) * z / ((p + 2 * m) * (p + 2 * m + 1))
        for term in (even, odd):
            d = 1 + term * d
            c = 1 + term / c
            d, c = 1 / np.where(np.abs(d) < tiny, tiny, d), np.where(np.abs(c) < tiny, tiny, c)
            result = result * d * c
        if np.abs(d * c - 1).max() < 1e-14:
            return result
    raise AssertionError("the continued fraction of the incomplete beta function has not converged")


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


def _beta_points(a: float, b: float) -> tuple[np.ndarray, np.ndarray]:
    """Points q of Beta(a, b) and their weights: the trapezoid rule over logit q, where the density is smooth and falls off
    exponentially, so that the rule errs by less than round-off."""
    spread = math.sqrt(1 / a + 1 / b)
    logit = math.log(a / b) + np.linspace(-_REACH, _REACH, _STEPS + 1) * spread
    log_q, log_rest = -np.logaddexp(0, -logit), -np.logaddexp(0, logit)
    weights = np.exp(a * log_q + b * log_rest - _log_beta(a, b))
    return np.exp(log_q), weights / weights.sum()


def _crossing(beyond: Callable[[float], bool]) -> float:
    """Where `beyond` (false at 0) becomes true, to 1e-12; 1 where it never does."""
    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if beyond(middle) else (middle, high)
    return high
