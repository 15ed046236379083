"""Precision, recall, density and coverage against slow versions from the papers' formulas; their errors against repeats."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusion.evaluation.metrics import manifold, pairs
from diffusion.evaluation.metrics.manifold import Estimate, Neighbourhood, Real, halves, neighbourhood
from diffusion.evaluation.metrics.pairs import squared_distances
from tests.metrics_by_hand import neighbourhood_by_hand

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = ("precision", "recall", "density", "coverage")


def normals(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rows", [512, 7])
@pytest.mark.parametrize(("n", "m", "scale"), [(40, 90, 1.0), (90, 40, 0.5), (61, 33, 1.5)])
def test_equals_the_papers_formulas_whatever_the_blocks(monkeypatch, rows, n, m, scale):
    monkeypatch.setattr(pairs, "TILE", rows)
    drawn, real = scale * normals(n, 4, 0) + 0.3, normals(m, 4, 1)
    found, expected = neighbourhood(drawn, Real.of(real)), neighbourhood_by_hand(drawn.numpy(), real.numpy())
    assert 0 < expected["recall"] < 1
    assert 0 < expected["coverage"] < 1
    for name in NAMES:
        assert getattr(found, name).value == pytest.approx(expected[name], rel=1e-12), name


def test_a_model_that_drops_modes_has_little_recall_and_coverage_but_full_precision():
    centres = 20 * normals(8, 6, 9)
    real = centres.repeat(40, 1) + normals(320, 6, 1)
    found = neighbourhood(centres[:2].repeat(60, 1) + 0.8 * normals(120, 6, 2), Real.of(real))
    assert found.precision.value > 0.95
    assert found.recall.value <= 0.25
    assert found.coverage.value <= 0.25
    noise = neighbourhood(20 * normals(120, 6, 3), Real.of(real))
    assert noise.precision.value < 0.05
    assert noise.density.value < 0.05


def test_copies_of_the_real_pictures_cover_them():
    real = normals(60, 5) + 100
    found = neighbourhood(real, Real.of(real))
    assert [getattr(found, name).value for name in ("precision", "recall", "coverage")] == [1, 1, 1]
    assert float(squared_distances(real, real).diagonal().max()) == 0


def test_halves_are_balanced():
    split = halves(101)
    assert split.shape == (32, 101)
    assert (split[:, 0::2][:, :50] != split[:, 1::2]).all()  # of each two neighbours one
    signs = split[:, 0:64:2].double() * 2 - 1  # every pair with every other: as often together as apart
    assert torch.equal(signs.T @ signs, 32 * torch.eye(32).double())


def test_radii_in_halves_are_those_of_the_halves_alone():
    x = normals(50, 3, 4)
    reach, nearest = manifold._neighbours(x, 49)
    first = halves(50)
    radii = manifold._radii_in_halves(reach, nearest, first)
    for split in (0, 5, 31):
        for half in (first[split], ~first[split]):
            alone = manifold._neighbours(x[half], 3)[0][:, 2]
            torch.testing.assert_close(radii[split][half], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("spread", [0.6, 1.1])
def test_the_stated_errors_are_those_of_repeated_samples(spread):
    """Of 200 samples of one model each states an error; together they show the true one.  A jackknife would state up to
    twice that of coverage, halves of the sample two thirds."""
    real = Real.of(normals(300, 3, 99))
    found = [neighbourhood(spread * normals(64, 3, seed), real) for seed in range(200)]
    for name in NAMES:
        values = np.array([getattr(each, name).value for each in found])
        errors = np.array([getattr(each, name).standard_error for each in found])
        assert 0.8 < math.sqrt((errors**2).mean()) / values.std() < 1.3, name
        bounds = [_interval(each, name) for each in found]
        held = np.mean([low <= values.mean() <= high for low, high in bounds])
        assert 0.9 <= held <= 0.995, name


def _interval(found: Neighbourhood, name: str) -> tuple[float, float]:
    estimate = getattr(found, name)
    return estimate.mean_interval(0.95) if name == "density" else estimate.share_interval(0.95)


def test_an_interval_stays_within_0_and_1_and_never_closes():
    for value, error in ((0.0, 0.0), (1.0, 0.0), (0.99, 0.01), (0.5, 0.02)):
        low, high = Estimate(value, error, 100, 100).share_interval(0.95)
        assert 0 <= low <= value <= high <= 1
        assert high - low > 0.01
    wilson = Estimate(0.9, math.sqrt(0.9 * 0.1 / 100), 10**6, 100).share_interval(0.95)
    assert wilson == pytest.approx((0.8256, 0.9448), abs=2e-4)  # 90 of 100, as tables have it
    assert Estimate(0.1, 0.2, 100, 100).mean_interval(0.95)[0] == 0


def test_too_few_pictures_are_refused():
    real = Real.of(normals(20, 4))
    with pytest.raises(ValueError, match="draw at least 8"):
        neighbourhood(normals(7, 4), real)
    with pytest.raises(ValueError, match="at least 6 are needed"):
        Real.of(normals(5, 4))
    with pytest.raises(ValueError, match="not of the same extractor"):
        neighbourhood(normals(9, 5), real)
