"""The Frechet distance of infinitely many samples: against that of the known population, and its error against repeats."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusion.evaluation.facts.distance import FrechetLimit
from diffusion.evaluation.metrics.extrapolate import CUBIC, PARTS, QUADRATIC, Extrapolated, _mean_over, extrapolate
from diffusion.evaluation.metrics.frechet import Gaussian, frechet
from diffusion.evaluation.metrics.intervals import jackknife_error, t_quantile
from diffusion.evaluation.metrics.sample import beside, jackknifed
from diffusion.evaluation.report.words import markdown
from tests.test_gate import IDENTITY, report

pytestmark = pytest.mark.usefixtures("one_thread")


def normals(n: int, d: int, seed: int) -> Tensor:
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def population(d: int, decay: float) -> tuple[Gaussian, Gaussian]:
    """A model and a reference whose eigenvalues fall as those of an extractor's features do."""
    scale = torch.arange(1, d + 1).double() ** -decay
    return Gaussian(0.1 * scale, 0.9 * scale.diag()), Gaussian(torch.zeros(d).double(), scale.diag())


def drawn(model: Gaussian, n: int, seed: int) -> Tensor:
    return model.mean + normals(n, len(model.mean), seed) @ model.root.T


def found_in(model: Gaussian, reference: Gaussian, n: int, seed: int) -> tuple[float, Extrapolated]:
    sample = beside(reference, drawn(model, n, seed))
    distance = jackknifed(sample)
    return distance.value, extrapolate(sample, distance)


@pytest.mark.parametrize("weights", [CUBIC, QUADRATIC])
def test_the_weights_take_off_powers_of_1_over_n(weights):
    """They leave a constant as it is, and what falls as 1 / N, 1 / N^2 (and of the cubic 1 / N^3) vanishes."""
    assert sum(weights) == pytest.approx(1, abs=1e-14)
    powers = 3 if weights is CUBIC else 2
    for power in range(1, powers + 1):
        assert sum(w * p**power for w, p in zip(weights, PARTS, strict=True)) == pytest.approx(0, abs=1e-12)


def test_a_part_is_the_same_as_that_part_alone():
    model, reference = population(12, 0.7)
    features = drawn(model, 96, 1)
    sample = beside(reference, features)
    value = {p: [sample.left_out(part=part, parts=p)[0] for part in range(p)] for p in PARTS}
    for parts, values in value.items():
        alone = [frechet(Gaussian.of(features[part::parts]), reference) for part in range(parts)]
        assert values == pytest.approx(alone, rel=1e-9)
    expected = sum(w * np.mean(value[p]) for w, p in zip(CUBIC, PARTS, strict=True))
    assert extrapolate(sample, jackknifed(sample)).value == pytest.approx(expected, rel=1e-6)
    kept = features[(torch.arange(96) % 4 == 1) & (torch.arange(96) % 32 != 9)]
    _, without = sample.left_out(part=1, parts=4)  # 9 is the third block of those 1, 5, 9, ...
    assert without[2] == pytest.approx(frechet(Gaussian.of(kept), reference), rel=1e-9)


def test_the_mean_over_parts_leaves_out_each_block_where_it_lies():
    model, reference = population(6, 0.5)
    features, number = drawn(model, 96, 2), torch.arange(96)
    mean, left_out = _mean_over(beside(reference, features), 4)
    for k in range(32):
        kept = [features[(number % 4 == part) & (number % 32 != k)] for part in range(4)]
        expected = sum(frechet(Gaussian.of(part), reference) for part in kept) / 4
        assert left_out[k] == pytest.approx(expected, rel=1e-9), k
    assert mean == pytest.approx(
        sum(frechet(Gaussian.of(features[part::4]), reference) for part in range(4)) / 4, rel=1e-9
    )


@pytest.mark.parametrize(("n", "d", "decay"), [(128, 32, 0.5), (64, 96, 0.7)])
def test_the_limit_is_the_populations_within_the_stated_interval(n, d, decay):
    """More samples than features and fewer: the distance itself is far too large, the limit is not, and its interval holds
    the truth about as often as it says.  So is the error of the distance that of repeated samples, where the jackknife alone
    states more."""
    model, reference = population(d, decay)
    truth = frechet(model, reference)
    found = [found_in(model, reference, n, seed) for seed in range(70)]
    values, errors = np.array([value for value, _ in found]), np.array([each.distance_error for _, each in found])
    limits = np.array([each.value for _, each in found])
    assert values.mean() > 1.2 * truth
    assert abs(limits.mean() - truth) < 0.25 * (values.mean() - truth)
    reports = [FrechetLimit.of(each, IDENTITY) for _, each in found]
    held = np.mean([each.low <= truth <= each.high for each in reports])
    assert held >= 0.88
    assert 0.85 < math.sqrt((errors**2).mean()) / values.std() < 1.3


def test_the_error_is_less_than_the_jackknifes_by_a_known_part_at_most():
    model, reference = population(60, 0.3)
    for seed in range(5):
        sample = beside(reference, drawn(model, 64, seed))
        distance = jackknifed(sample)
        error = extrapolate(sample, distance).distance_error
        assert jackknife_error(distance.left_out) * math.sqrt(3 / 4) <= error + 1e-12
        assert error <= jackknife_error(distance.left_out)


def test_the_interval_has_error_and_doubt_and_is_never_negative():
    found = FrechetLimit.of(Extrapolated(value=10.0, standard_error=1.0, doubt=3.0, distance_error=1.0), IDENTITY)
    half = math.hypot(t_quantile(0.975, 31), 3.0)
    assert (found.low, found.high) == pytest.approx((10 - half, 10 + half), rel=1e-5)
    below = FrechetLimit.of(Extrapolated(value=-1.0, standard_error=1.0, doubt=0.0, distance_error=1.0), IDENTITY)
    assert (below.value, below.low) == (0, 0)
    assert 0 < below.high < 2.1


def test_the_report_has_the_limit_with_its_interval():
    limit = FrechetLimit.of(Extrapolated(value=20.0, standard_error=1.5, doubt=3.0, distance_error=1.0), IDENTITY)
    made = report(100.0).model_copy(update={"frechet_limit": limit})
    assert f"20 ± 1.5 (standard error) | 95% interval {limit.low:.4g} to {limit.high:.4g}" in markdown(made)
    names = ("frechet_limit", "frechet_limit_low", "frechet_limit_high")
    assert [made.metrics()[name] for name in names] == [limit.value, limit.low, limit.high]
    assert "frechet_limit" not in report(100.0).metrics()


def test_too_few_samples_are_refused():
    model, reference = population(4, 0.5)
    sample = beside(reference, drawn(model, 63, 0))
    with pytest.raises(ValueError, match="draw at least 64"):
        extrapolate(sample, jackknifed(sample))
