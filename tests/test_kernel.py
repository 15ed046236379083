"""The kernel distance against a slow version pair by pair; its standard error against repeated samples."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusion.evaluation.metrics import kernel as module
from diffusion.evaluation.metrics import pairs
from diffusion.evaluation.metrics.kernel import kernel_distance, mean_within
from tests.metrics_by_hand import kernel_by_hand

pytestmark = pytest.mark.usefixtures("one_thread")


def normals(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def distance(a: Tensor, b: Tensor, **options) -> module.Distance:
    return kernel_distance(a, b, within=mean_within(b), **options)


def test_equals_the_sum_over_pairs_whatever_the_blocks(monkeypatch):
    a, b = normals(23, 7, 0) + 0.5, 2 * normals(31, 7, 1)
    expected = kernel_by_hand(a.numpy(), b.numpy())
    assert distance(a, b).value == pytest.approx(expected, rel=1e-12)
    monkeypatch.setattr(pairs, "TILE", 5)
    assert distance(a, b).value == pytest.approx(expected, rel=1e-12)
    assert distance(a, b, blocks=4).value == pytest.approx(expected, rel=1e-12)


def test_the_jackknife_leaves_out_each_block():
    a, b = normals(30, 5, 0) + 1, normals(20, 5, 1)
    found = distance(a, b, blocks=7)
    for block, left in enumerate(found.left_out):
        kept = a[torch.arange(30) % 7 != block]
        assert left == pytest.approx(kernel_by_hand(kept.numpy(), b.numpy()), rel=1e-9)


def test_classes_in_fixed_proportions_are_taken_into_account():
    """The mean over pairs within and between classes, each by its share, as written; and so without a block."""
    labels = torch.tensor([0] * 13 + [1] * 4 + [2] * 6 + [3, 3, 4])  # the last two classes join the third
    x, y = normals(26, 5, 0) + labels[:, None] % 3, normals(20, 5, 1)
    joined = labels.clamp(max=2)

    def by_hand(x: Tensor, joined: Tensor) -> float:
        k = (x @ x.T / 5 + 1) ** 3
        total = 0.0
        for c in range(3):
            for d in range(3):
                part = k[joined == c][:, joined == d]
                n, m = part.shape
                mean = part.mean() if c != d else (part.sum() - part.trace()) / (n * (n - 1))
                total += n * m / len(x) ** 2 * float(mean)
        return total - 2 * float(((x @ y.T / 5 + 1) ** 3).mean()) + mean_within(y)

    found = distance(x, y, labels=labels, blocks=8)
    assert found.value == pytest.approx(by_hand(x, joined), rel=1e-12)
    for block, left in enumerate(found.left_out):
        kept = torch.arange(26) % 8 != block
        assert left == pytest.approx(by_hand(x[kept], joined[kept]), rel=1e-9)
    assert distance(x, y, labels=torch.zeros(26, dtype=torch.int64)).value == pytest.approx(
        distance(x, y).value, rel=1e-12
    )


def test_sums_over_pairs_of_parts_merge():
    """The mean over a set's pairs is put together from those within and between its parts, in any order."""
    x = normals(40, 6, 3)
    parts = x.split([7, 13, 20])
    within = [len(part) * (len(part) - 1) * mean_within(part) for part in parts]
    between = [float(module.kernel(a, b).sum()) for a in parts for b in parts if a is not b]
    for order in (1, -1):
        assert sum([*within, *between][::order]) / (40 * 39) == pytest.approx(mean_within(x), rel=1e-12)


def test_is_unbiased_and_states_its_error():
    """A set of its own reference's distribution is at 0 in the mean, though all distances of finite sets have a spread; the
    stated error is that spread, far from the reference as near it."""
    reference = normals(400, 8, 99)
    for shift in (0.0, 0.3):
        found = [distance(normals(64, 8, seed) + shift, reference) for seed in range(150)]
        values = np.array([each.value for each in found])
        errors = np.array([each.standard_error for each in found])
        # given the reference, the mean over samples is that of ever more pictures
        many = distance(normals(6_000, 8, 7) + shift, reference)
        assert abs(values.mean() - many.value) < 4 * math.hypot(values.std() / math.sqrt(150), many.standard_error)
        assert 0.8 < math.sqrt((errors**2).mean()) / values.std() < 1.3
    assert values.mean() > 10 * values.std() / math.sqrt(150)


def test_what_products_of_two_add_is_their_variance():
    """Of features whose mean given either picture vanishes: x . x' alone, whose square has the mean trace(cov^2)."""
    values = []
    for seed in range(200):
        x = normals(20, 6, seed)
        k = x @ x.T
        k.fill_diagonal_(0)
        values.append(module._variance_of_products(k.sum(dim=1), float(k.square().sum())))
    assert np.mean(values) == pytest.approx(2 * 6 / (20 * 19), rel=0.1)


@pytest.mark.parametrize(
    ("drawn", "real", "message"),
    [
        (normals(3, 4), normals(9, 4), "draw at least 4"),
        (normals(9, 4), normals(9, 5), "not of the same extractor"),
        (normals(9, 4) / 0, normals(9, 4), "not all finite"),
    ],
)
def test_what_cannot_be_compared_is_said(drawn, real, message):
    with pytest.raises(ValueError, match=message):
        distance(drawn, real)
    with pytest.raises(ValueError, match="at least 2"):
        mean_within(normals(1, 4))
