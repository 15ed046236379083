"""Left-out values of a jackknife with a standard error of our choice."""

import math

import scipy.linalg


def left_out(value: float, error: float, blocks: int, pattern: int) -> tuple[float, ...]:
    """`blocks`, a power of two, values around `value`.  Those of different patterns (1 to blocks - 1) are uncorrelated, so
    that the standard error of a difference is sqrt(error^2 + other error^2)."""
    signs = scipy.linalg.hadamard(blocks)[pattern]
    return tuple(float(value + sign * error / math.sqrt(blocks - 1)) for sign in signs)
