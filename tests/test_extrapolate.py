"""The Frechet distance of infinitely many samples: against that of the known population, and its error against repeats."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusion.evaluation.facts.distance import FrechetLimit
from diffusion.evaluation.metrics import spectrum
from diffusion.evaluation.metrics.extrapolate import (
    Curve,
    Extrapolated,
    _curve,
    _Reference,
    _told,
    extrapolate,
)
from diffusion.evaluation.metrics.frechet import Gaussian, frechet
from diffusion.evaluation.metrics.intervals import jackknife_error, t_quantile
from diffusion.evaluation.metrics.jackknife import PAIRS, error_by_pairs, of_pairs
from diffusion.evaluation.metrics.sample import Distance, beside, jackknifed
from diffusion.evaluation.metrics.spectrum import spectra
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


def found_in(model: Gaussian, reference: Gaussian, n: int, seed: int) -> tuple[Distance, Extrapolated]:
    return extrapolate(beside(reference, drawn(model, n, seed)))


def counted(eigenvalues: Tensor, k: Tensor) -> Tensor:
    return (eigenvalues / (eigenvalues + k[:, None])).sum(dim=1)


def curve_of(model: Gaussian, reference: Gaussian, features: Tensor) -> Curve:
    return _curve(next(spectra(beside(reference, features))))


def doubt_of(model: Gaussian, reference: Gaussian, seed: int) -> float:
    sample = beside(reference, drawn(model, 64, seed))
    return _Reference.of(sample).doubt(next(spectra(sample)))


@pytest.mark.parametrize(("n", "d"), [(160, 40), (80, 120)])
def test_the_sample_tells_the_populations_curve(n, d):
    """More samples than features and fewer: D(k) is the population's, where what the sample has at t = k is far below."""
    model, reference = population(d, 0.7)
    eigenvalues = torch.linalg.svdvals(reference.root.T @ model.root).square()
    told, naive = [], []
    for seed in range(12):
        features = drawn(model, n, seed)
        curve = curve_of(model, reference, features)
        near = (curve.k > 1.01 * curve.k[0]) & (curve.k < eigenvalues[0])
        assert (curve.k.diff() > 0).all()
        truth = counted(eigenvalues, curve.k[near])
        own = next(spectra(beside(reference, features))).eigenvalues
        told.append(float((curve.count[near] / truth).log().mean()))
        naive.append(float((counted(own, curve.k[near]) / truth).log().mean()))
    assert abs(np.mean(told)) < 0.2 * abs(np.mean(naive))
    assert abs(np.mean(told)) < 0.02


def test_leaving_a_picture_out_of_n_is_not_adding_one_to_n():
    """Where the sample tells least, at k(0), that is a difference of 1 / n."""
    model, reference = population(80, 0.5)
    eigenvalues = torch.linalg.svdvals(reference.root.T @ model.root).square()
    curves = [curve_of(model, reference, drawn(model, 40, seed)) for seed in range(80)]
    off = [float((curve.count[0] / counted(eigenvalues, curve.k[:1])).log()) for curve in curves]
    assert abs(np.mean(off)) < 0.4 / 40


def test_told_and_untold_are_the_trace_of_the_root():
    """Of the exact curve of a reference's own spectrum, cut anywhere; so also of any multiple of it."""
    reference = Gaussian(torch.zeros(50).double(), (torch.arange(1, 51).double() ** -0.8).diag())
    known = _Reference.of(beside(reference, normals(64, 50, 0)))
    for factor, cut in ((1.0, 1e-3), (3.0, 0.05), (0.1, 1e-12)):
        eigenvalues = factor * reference.root.diagonal() ** 4
        k = torch.linspace(math.log(cut), 16, 4000).double().exp()
        curve = Curve(k, counted(eigenvalues, k))
        whole = _told(curve) + known._untold(curve)
        assert whole == pytest.approx(float(eigenvalues.sqrt().sum()), rel=1e-4)
        assert known._untold(curve, known._power(curve)) == pytest.approx(known._untold(curve), rel=1e-2)


def test_pictures_of_unlike_size_are_allowed_for():
    """Where the features of each picture have a factor of their own, k(t) is not that of Gaussian features."""
    model, reference = population(60, 0.6)
    limits, without = [], []
    for seed in range(30):
        size = torch.where(normals(96, 1, 1000 + seed) > 0.5, 1.6, 0.5) / 0.9812  # of mean square 1
        sample = beside(reference, model.mean + size * (drawn(model, 96, seed) - model.mean))
        found, known = next(spectra(sample)), _Reference.of(sample)
        alike = found._replace(shares=torch.full_like(found.shares, 1 / found.n))
        for values, each in ((limits, found), (without, alike)):
            values.append(known.limit(each))
    truth = frechet(model, reference)
    assert abs(np.mean(limits) - truth) < 0.15 * abs(np.mean(without) - truth)


@pytest.mark.parametrize("d", [12, 200])
def test_what_is_left_without_blocks_is_that_alone(d):
    """By an independent way, of few features and of many."""
    model, reference = population(d, 0.7)
    features, number = drawn(model, 96, 1), torch.arange(96)
    groups = [(3,), (0, 31), (30, 4, 5)]
    found = list(spectra(beside(reference, features), groups))
    assert len(found) == 1 + 3
    for each, left in zip(found, [(), *groups], strict=True):
        some = features[~torch.isin(number % 32, torch.tensor(left).long())]
        rows = (some - some.mean(dim=0)) @ reference.root / math.sqrt(len(some) - 1)
        left, singular, _ = torch.linalg.svd(rows, full_matrices=False)
        rank = min(len(some) - 1, d)
        assert each.n == len(some)
        assert each.distance == pytest.approx(frechet(Gaussian.of(some), reference), rel=1e-7)
        assert each.apart == pytest.approx(float((some - reference.mean).square().sum(dim=1).mean()), rel=1e-9)
        assert torch.allclose(each.eigenvalues, singular[:rank].flip(0).square(), rtol=1e-7)
        assert torch.allclose(each.shares, left[:, :rank].flip(1).square(), atol=1e-6)


@pytest.mark.parametrize(("n", "apart"), [(72, 5), (128, 9), (256, 17)])
def test_shares_are_of_pictures_from_all_of_the_sample_and_all_blocks(monkeypatch, n, apart):
    model, reference = population(5, 0.5)
    sample = beside(reference, drawn(model, n, 3))
    every = next(spectra(sample)).shares
    monkeypatch.setattr(spectrum, "SHARES", 16)
    whole, *without = spectra(sample, [(block,) for block in range(32)])
    assert torch.equal(whole.shares, every[::apart])
    fewer = [len(whole.shares) - len(each.shares) for each in without]
    assert (sum(fewer), max(fewer)) == (len(whole.shares), 1)


def test_the_doubt_is_large_where_the_model_lacks_the_references_spectrum():
    """With fewer samples than features: what the samples do not tell is then not as the reference has it."""
    model, reference = population(120, 0.3)
    rough = Gaussian(model.mean, model.root + 0.8 * torch.eye(120).double())
    alike, unlike = ([doubt_of(each, reference, seed) for seed in range(5)] for each in (model, rough))
    assert np.mean(unlike) > 2 * np.mean(alike) > 0


def test_what_is_told_in_full_is_not_doubted():
    model, reference = population(12, 0.5)
    assert found_in(model, reference, 96, 0)[1].doubt < 1e-6


def test_pictures_that_are_all_one_have_a_limit():
    _, reference = population(6, 0.5)
    sample = beside(reference, torch.ones(64, 6))
    _, found = extrapolate(sample)
    assert found.value == pytest.approx(6 + float(reference.trace))
    assert (found.standard_error, found.doubt) == (0, 0)


def left_out_of(function: Callable[[Tensor], float], values: Tensor) -> tuple[list[float], list[float]]:
    """Without each block, and without each of the pairs."""
    block = torch.arange(len(values)) % 32
    alone = [function(values[block != k]) for k in range(32)]
    return alone, [function(values[(block != a) & (block != b)]) for a, b in PAIRS]


def test_pairs_are_of_all_blocks_and_near_as_often_as_far():
    assert sorted(block for pair in PAIRS for block in pair) == list(range(32))
    apart = [min(b - a, 32 - (b - a)) for a, b in PAIRS]
    assert sorted(apart) == sorted([*range(1, 16, 2)] * 2)


def test_what_is_of_one_block_alone_is_no_product():
    values = normals(64, 1, 0)[:, 0]
    assert of_pairs(5 + float(values.mean()), *left_out_of(lambda some: 5 + float(some.mean()), values)) < 1e-20


@pytest.mark.parametrize("power", [-1.0, -0.5, 0.5])
def test_a_bias_is_no_product(power):
    """However it falls with the number of samples."""
    values = torch.zeros(64)
    assert of_pairs(100 * 64**power, *left_out_of(lambda some: 100 * len(some) ** power, values)) < 1e-20


def test_products_are_known_from_pairs():
    """Of the square of a mean, all of whose variance is of products: half of what the jackknife states."""
    found, whole = [], []

    def squared(values: Tensor) -> float:
        return float(values.mean(dim=0).square().sum() - values.var(dim=0).sum() / len(values))

    for seed in range(60):
        values = normals(64, 80, seed)
        left_out, pairs = left_out_of(squared, values)
        whole.append(squared(values))
        found.append(jackknife_error(left_out) ** 2 - of_pairs(whole[-1], left_out, pairs))
    assert np.mean(found) == pytest.approx(2 * 80 / 64**2, rel=0.15)
    assert np.var(whole) == pytest.approx(2 * 80 / 64**2, rel=0.4)


def test_three_quarters_of_the_products_are_taken_off_and_never_more_than_there_can_be():
    """Of values without blocks whose jackknife variance is 31 / 32 of 32, and without pairs by what their products add."""
    alone = [(-1.0) ** (k // 2) for k in range(32)]
    for size, taken in ((0.1, 0.75 * 0.01 * (16 / 15) * 900 * 31 / 64), (9.0, 0.75 * 31 / 2)):
        pairs = [31 / 30 * (alone[a] + alone[b]) + size * (-1) ** a for a, b in PAIRS]
        assert error_by_pairs([0.0, *alone, *pairs]) ** 2 == pytest.approx(31 - taken)


@pytest.mark.parametrize(("n", "d", "decay"), [(128, 32, 0.5), (64, 96, 0.7)])
def test_the_limit_is_the_populations_within_the_stated_interval(n, d, decay):
    """More samples than features and fewer: the distance itself is far too large, the limit is not, and its interval holds
    the truth about as often as it says.  So is the error of the distance that of repeated samples, where the jackknife alone
    states more."""
    model, reference = population(d, decay)
    truth = frechet(model, reference)
    found = [found_in(model, reference, n, seed) for seed in range(40)]
    values, errors = (np.array([getattr(each, name) for each, _ in found]) for name in ("value", "standard_error"))
    limits = np.array([each.value for _, each in found])
    assert values.mean() > 1.2 * truth
    assert abs(limits.mean() - truth) < 0.05 * (values.mean() - truth) + 2.5 * limits.std() / math.sqrt(40)
    reports = [FrechetLimit.of(each, IDENTITY) for _, each in found]
    held = np.mean([each.low <= truth <= each.high for each in reports])
    assert held >= 0.87
    assert 0.85 < math.sqrt((errors**2).mean()) / values.std() < 1.3


def test_the_error_is_less_than_the_jackknifes_by_a_known_part_at_most():
    model, reference = population(60, 0.3)
    for seed in range(5):
        sample = beside(reference, drawn(model, 64, seed))
        plain, (distance, _) = jackknifed(sample), extrapolate(sample)
        assert distance.value == pytest.approx(plain.value, rel=1e-9)
        assert distance.left_out == pytest.approx(plain.left_out, rel=1e-9)
        assert plain.standard_error * math.sqrt(5 / 8) <= distance.standard_error + 1e-12
        assert distance.standard_error <= plain.standard_error


def test_the_interval_has_error_and_doubt_and_is_never_negative():
    found = FrechetLimit.of(Extrapolated(value=10.0, standard_error=1.0, doubt=3.0), IDENTITY)
    half = math.hypot(t_quantile(0.975, 31), 3.0)
    assert (found.low, found.high) == pytest.approx((10 - half, 10 + half), rel=1e-5)
    below = FrechetLimit.of(Extrapolated(value=-1.0, standard_error=1.0, doubt=0.0), IDENTITY)
    assert (below.value, below.low) == (0, 0)
    assert 0 < below.high < 2.1


def test_the_report_has_the_limit_with_its_interval():
    limit = FrechetLimit.of(Extrapolated(value=20.0, standard_error=1.5, doubt=3.0), IDENTITY)
    made = report(100.0).model_copy(update={"frechet_limit": limit})
    assert f"20 ± 1.5 (standard error) | 95% interval {limit.low:.4g} to {limit.high:.4g}" in markdown(made)
    names = ("frechet_limit", "frechet_limit_low", "frechet_limit_high")
    assert [made.metrics()[name] for name in names] == [limit.value, limit.low, limit.high]
    assert "frechet_limit" not in report(100.0).metrics()


def test_too_few_samples_are_refused():
    model, reference = population(4, 0.5)
    sample = beside(reference, drawn(model, 63, 0))
    with pytest.raises(ValueError, match="draw at least 64"):
        extrapolate(sample)
