"""Real pictures in the place of drawn ones: disjoint, and in the frequencies of the classes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusion.evaluation.metrics.splits import allocate, floor

pytestmark = pytest.mark.usefixtures("one_thread")


def test_floor_takes_disjoint_pictures_in_the_frequencies_of_the_classes():
    """Classes far apart: a split with other frequencies than the rest would be far from it."""
    labels = torch.arange(300) % 3
    x = torch.randn(300, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 100 * labels[:, None]
    least = floor(x, labels, 90, seed=3)
    assert (least.pictures, least.against, least.splits) == (90, 210, 4)
    assert least.value < 10  # means of the splits differ by 100 / 90 for one picture of another class
    assert floor(x, labels, 90, seed=3) == least
    assert floor(x, labels, 90, seed=4) != least
    assert floor(x, labels, 10_000, seed=3).pictures == 150


@given(st.lists(st.integers(0, 50), min_size=1, max_size=8).filter(any), st.integers(1, 200))
def test_allocation_is_by_largest_remainder(counts, n):
    given_ = allocate(counts, n)
    assert sum(given_) == n
    for count, share in zip(counts, given_, strict=True):
        assert abs(share - n * count / sum(counts)) < 1
        assert share == 0 or count > 0


def test_allocation_breaks_ties_by_class():
    assert allocate([1, 1, 1], 4) == [2, 1, 1]
    assert allocate([85, 0, 15], 10) == [9, 0, 1]  # 8.5 and 1.5


def test_no_pictures_have_no_frequencies():
    with pytest.raises(ValueError, match="no pictures"):
        allocate([0, 0], 3)
