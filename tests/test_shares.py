"""The interval of a share beside a finite control sample: exact binomial tails, and a coverage that is kept."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffusion.evaluation.metrics.shares import betainc, excess, excess_interval


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 64))
def test_the_incomplete_beta_function_is_a_binomial_tail(a, b, sixty_fourths):
    n, p = a + b - 1, Fraction(sixty_fourths, 64)
    exact = sum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(a, n + 1))
    assert betainc(a, b, np.array([float(p)]))[0] == pytest.approx(float(exact), rel=1e-10, abs=1e-14)


def test_the_incomplete_beta_function_of_large_numbers_is_a_normal_tail():
    n, p = 100_000, 0.05
    x = 1.5
    k = round(n * p + x * math.sqrt(n * p * (1 - p)) + 0.5)
    assert betainc(k, n - k + 1, np.array([p]))[0] == pytest.approx(math.erfc(x / math.sqrt(2)) / 2, rel=0.02)


@pytest.mark.parametrize(("n", "control", "rank", "near"), [(20, 9, 1, 11), (50, 30, 2, 14)])
def test_low_leaves_0_where_the_beta_binomial_tail_says_so(n, control, rank, near):
    """Without copies the count is beta-binomial, whose tail is a sum of fractions."""

    def tail(k: int) -> Fraction:
        a, b = rank, control + 1 - rank

        def beta(x: int, y: int) -> Fraction:
            return Fraction(math.factorial(x - 1) * math.factorial(y - 1), math.factorial(x + y - 1))

        return sum(math.comb(n, j) * beta(a + j, b + n - j) / beta(a, b) for j in range(k, n + 1))

    doubt = float(tail(near))
    facts = {"rank": rank, "control": control}
    assert excess_interval(near, n, **facts, confidence=1 - 2 * doubt * 1.0001)[0] > 0
    assert excess_interval(near, n, **facts, confidence=1 - 2 * doubt * 0.9999)[0] == 0


@pytest.mark.parametrize(("share", "n", "control", "rank"), [(0.0, 64, 30, 2), (0.1, 100, 60, 3), (0.7, 20, 8, 1)])
def test_the_interval_covers_the_share_in_95_of_100_repeats(share, n, control, rank):
    random = np.random.default_rng(0)
    q = np.sort(random.random((2_000, control)), axis=1)[:, rank - 1]
    near = random.binomial(n, share + (1 - share) * q)
    table = {k: excess_interval(int(k), n, rank=rank, control=control, confidence=0.95) for k in np.unique(near)}
    covered = np.mean([table[k][0] <= share <= table[k][1] for k in near])
    accused = np.mean([table[k][0] > 0 for k in near])
    assert covered > 0.945  # tails of counts are at most as large as stated
    if share == 0:
        assert accused < 0.03


def test_the_estimate_lies_within_and_all_near_is_all_copies():
    for near in (0, 3, 40, 99, 100):
        facts = {"rank": 2, "control": 50}
        low, high = excess_interval(near, 100, **facts, confidence=0.95)
        assert low <= excess(near, 100, **facts) <= high
    assert excess(100, 100, **facts) == 1 == high
    assert excess(0, 100, **facts) == 0


def test_high_also_holds_where_no_other_picture_is_near():
    """Clopper and Pearson's limit: a model whose own pictures are far off has as many near ones as it has copies."""
    facts = {"rank": 10, "control": 200, "confidence": 0.95}
    assert excess_interval(0, 128, **facts) == (0, pytest.approx(1 - 0.025 ** (1 / 128)))
    low, high = excess_interval(10, 512, **facts)  # fewer than like the control, 25
    assert (low, high) == (0, pytest.approx(0.0356, abs=2e-4))
    random = np.random.default_rng(0)
    near = random.binomial(512, 0.02, 2_000)
    assert np.mean([excess_interval(int(k), 512, **facts)[1] >= 0.02 for k in near]) > 0.97


def test_counts_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="5 of 4 values"):
        excess_interval(5, 4, rank=1, control=9, confidence=0.95)
    with pytest.raises(ValueError, match="rank 10 of 9"):
        excess_interval(3, 4, rank=10, control=9, confidence=0.95)
