"""The Frechet distance against closed forms and an independent slow version; its standard error against many samples."""

import math

import pytest
import scipy.linalg
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffusion.evaluation.metrics.frechet import FeatureStats, Gaussian, frechet
from diffusion.evaluation.metrics.sample import beside, frechet_to
from diffusion.evaluation.metrics.splits import floor

pytestmark = pytest.mark.usefixtures("one_thread")


def normals(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def textbook(a: Tensor, b: Tensor) -> float:
    """FID as written in the paper, with a matrix square root; needs full rank."""
    root = scipy.linalg.sqrtm((a.T.cov() @ b.T.cov()).numpy()).real
    shift = (a.mean(0) - b.mean(0)).square().sum()
    return float(shift + a.T.cov().trace() + b.T.cov().trace() - 2 * root.trace())


def test_known_gaussians():
    """Commuting covariances: |mu_a - mu_b|^2 + sum (s_a - s_b)^2."""
    s_a, s_b = torch.tensor([1.0, 2.0, 0.0]).double(), torch.tensor([3.0, 0.5, 1.0]).double()
    a = Gaussian(torch.tensor([1.0, 0.0, 0.0]).double(), s_a.diag())
    b = Gaussian(torch.tensor([0.0, 2.0, 0.0]).double(), s_b.diag())
    assert frechet(a, b) == pytest.approx(5 + 4 + 2.25 + 1, rel=1e-12)
    turn = torch.linalg.qr(normals(3, 3)).Q  # a root is known up to a rotation only
    assert frechet(Gaussian(a.mean, a.root @ turn), b) == pytest.approx(12.25, rel=1e-12)


def test_a_shift_and_a_scale_of_one_set():
    x = normals(50, 8)
    shifted = frechet(Gaussian.of(x), Gaussian.of(x + 0.5))
    assert shifted == pytest.approx(8 * 0.25, rel=1e-9)
    scaled = frechet(Gaussian.of(x - x.mean(0)), Gaussian.of(3 * (x - x.mean(0))))
    assert scaled == pytest.approx(4 * float(x.T.cov().trace()), rel=1e-9)


def test_equals_the_textbook_where_that_is_defined():
    a, b = normals(200, 12, 0) @ normals(12, 12, 1), normals(300, 12, 2) + 0.3
    assert frechet(Gaussian.of(a), Gaussian.of(b)) == pytest.approx(textbook(a, b), rel=1e-8)
    assert frechet_to(Gaussian.of(b), a).value == pytest.approx(textbook(a, b), rel=1e-8)


@pytest.mark.parametrize(("n", "m", "d"), [(10, 7, 40), (10, 200, 40), (100, 7, 40), (300, 500, 20)])
def test_all_forms_agree_whatever_the_rank(n, m, d):
    """From features, from sums, and as a sample: fewer pictures than features on either side, or on none."""
    a, b = normals(n, d, 0), 0.7 * normals(m, d, 1) + 0.1
    expected = frechet(Gaussian.of(a), Gaussian.of(b))
    assert frechet(Gaussian.of(b), Gaussian.of(a)) == pytest.approx(expected, rel=1e-9)
    sums = frechet(Gaussian.of_stats(FeatureStats.of(a)), Gaussian.of_stats(FeatureStats.of(b)))
    assert sums == pytest.approx(expected, rel=1e-6)
    assert frechet_to(Gaussian.of(b), a, blocks=4).value == pytest.approx(expected, rel=1e-9)


def test_a_set_is_at_distance_0_from_itself():
    for n in (10, 200):
        x = normals(n, 40) + 3
        assert frechet(Gaussian.of(x), Gaussian.of(x)) < 1e-9
        assert frechet_to(Gaussian.of(x), x, blocks=4).value < 1e-9


def test_halves_of_one_set_are_at_distance_0_within_the_stated_error():
    """The distance's own bias is the floor; beyond that, halves of one distribution do not differ."""
    mixing = normals(16, 16, 9)
    x = normals(2_000, 16) @ mixing
    half = frechet_to(Gaussian.of(x[1000:]), x[:1000])
    least = floor(x, torch.zeros(2_000, dtype=torch.int64), 1_000, seed=1, splits=8)
    assert abs(half.value - least.value) < 4 * math.hypot(half.standard_error, least.spread)
    assert half.value < 0.01 * float(x.T.cov().trace())


def by_singular_values(reference: Gaussian, x: Tensor) -> float:
    """Of pictures as they are, without sums or products of any two."""
    root = (x - x.mean(dim=0)) / math.sqrt(len(x) - 1)
    overlap = torch.linalg.svdvals(root @ reference.root).sum()
    shift = (x.mean(dim=0) - reference.mean).square().sum()
    return float(shift + root.square().sum() + reference.trace - 2 * overlap)


@pytest.mark.parametrize("n", [50, 90, 100, 130, 400])
def test_features_of_unlike_size_lose_no_digits(n):
    """The eigenvalues of a product of two covariances span the squares of what the features' own do: 22 decades here, as of
    real extractors.  Fewer and more pictures than features, and about as many."""
    scale = 10 ** -torch.linspace(0, 5.5, 100).double()
    reference = Gaussian(torch.zeros(100).double(), (0.9 * scale).diag())
    x = normals(n, 100, 1) * scale
    sample, number = beside(reference, x, blocks=4), torch.arange(n)
    whole, without = sample.left_out()
    exact = [by_singular_values(reference, x[number % 4 != k]) for k in (-1, *range(4))]
    assert [whole, *without] == pytest.approx(exact, rel=1e-7)
    half, _ = beside(reference, x, number[1::2]).left_out()
    assert half == pytest.approx(by_singular_values(reference, x[1::2]), rel=1e-7)


def test_a_sample_may_show_few_pictures_many_times():
    """Of rank 6 where there could be 40: what round-off adds to the other eigenvalues counts for nothing."""
    x = normals(7, 40, 1)[torch.arange(700) % 7]
    reference = Gaussian.of(normals(300, 40, 2))
    found, without = beside(reference, x, blocks=4).left_out()
    assert found == pytest.approx(by_singular_values(reference, x), rel=1e-9)
    assert without[3] == pytest.approx(by_singular_values(reference, x[torch.arange(700) % 4 != 3]), rel=1e-9)


def test_a_sample_may_lie_among_other_rows():
    x, rows = normals(500, 12), torch.arange(3, 500, 4)
    reference = Gaussian.of(normals(60, 12, 1))
    for some in (rows, rows[:5]):
        expected = frechet(reference, Gaussian.of(x[some]))
        assert beside(reference, x, some, blocks=1).left_out() == (pytest.approx(expected, rel=1e-9), [])


@pytest.mark.parametrize(("n", "d", "r", "rank"), [(900, 20, 400, 20), (900, 20, 31, 20), (4_000, 24, 900, 11)])
def test_sums_give_the_distance_of_the_features_themselves(n, d, r, rank):
    """With many pictures a distance and its jackknife come from sums: of float32 features, also of lower rank than numbers,
    with a reference of more and of fewer pictures than twice the numbers."""
    mixing = normals(d, rank) @ normals(rank, d, 1)
    x, y = ((normals(count, d, seed) @ mixing + 5).float() for count, seed in ((n, 2), (r, 3)))
    reference = Gaussian.of(y)
    by_sums = frechet_to(reference, x, blocks=6)
    number = torch.arange(n)
    exact = [by_singular_values(reference, x[number % 6 != k].double()) for k in (-1, *range(6))]
    assert by_sums.value == pytest.approx(exact[0], rel=1e-7)
    assert by_sums.left_out == pytest.approx(exact[1:], rel=1e-7)
    assert 0 < by_sums.standard_error < 0.2 * by_sums.value


def test_sums_of_chunks_are_those_of_the_whole():
    x = normals(5_000, 6).float()
    whole, rows = FeatureStats.of(x), torch.arange(0, 5_000, 3)
    assert torch.allclose(whole.outer, x.double().T @ x.double(), rtol=1e-12)
    part = FeatureStats.of_rows(x, rows)
    assert (part.n, whole.n) == (len(rows), 5_000)
    rest = whole.without(part)
    others = torch.ones(5_000, dtype=torch.bool)
    others[rows] = False
    assert torch.allclose(rest.covariance, x[others].double().T.cov(), rtol=1e-9)
    assert torch.allclose(rest.merge(part).sum, whole.sum, rtol=1e-9)


@given(st.lists(st.integers(1, 9), min_size=2, max_size=6), st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_sums_merge_in_any_order(sizes, random):
    x = normals(sum(sizes), 5, sum(sizes)) * 10 + 3
    parts = [FeatureStats.of(part) for part in x.split(sizes)]
    whole = FeatureStats.of(x)

    def total(order: list[FeatureStats]) -> FeatureStats:
        result = FeatureStats.empty(5)
        for part in order:
            result = result.merge(part)
        return result

    shuffled = list(parts)
    random.shuffle(shuffled)
    cut = random.randrange(len(parts))
    nested = total(parts[:cut]).merge(total(parts[cut:]))
    for merged in (total(parts), total(shuffled), nested):
        assert merged.n == whole.n
        torch.testing.assert_close(merged.sum, whole.sum, rtol=1e-12, atol=1e-9)
        torch.testing.assert_close(merged.outer, whole.outer, rtol=1e-12, atol=1e-9)
    again = total(parts)
    assert torch.equal(total(parts).outer, again.outer)  # one order, the same bits
    assert torch.equal(total(parts).sum, again.sum)


@pytest.mark.parametrize(("n", "d", "largest"), [(40, 60, 1.6), (150, 24, 1.3)])
def test_standard_error_is_that_of_repeated_samples(n, d, largest):
    """Each of 120 samples states an error; together they show the true one.  With fewer pictures than features the
    jackknife errs to the safe side, by up to sqrt 2 where products of two pictures make all of the variance.
    """
    mixing = normals(d, d, 5) / math.sqrt(d)
    reference = Gaussian.of(normals(400, d, 6) @ mixing)
    found = [frechet_to(reference, 0.9 * normals(n, d, 100 + i) @ mixing, blocks=20) for i in range(120)]
    true = torch.tensor([distance.value for distance in found]).std().item()
    stated = torch.tensor([distance.standard_error for distance in found]).mean().item()
    assert 0.85 < stated / true < largest  # the standard deviation of 120 numbers is known to 6.5 %


def test_jackknife_is_the_definition():
    x, reference = normals(12, 4), Gaussian.of(normals(30, 4, 1))
    found = frechet_to(reference, x, blocks=3)
    keep = [[i for i in range(12) if i % 3 != k] for k in range(3)]
    left_out = [frechet(Gaussian.of(x[rows]), reference) for rows in keep]
    assert found.left_out == pytest.approx(left_out, rel=1e-9)
    mean = sum(left_out) / 3
    assert found.standard_error == pytest.approx(math.sqrt(2 / 3 * sum((v - mean) ** 2 for v in left_out)), rel=1e-9)


def test_what_cannot_be_measured_is_refused():
    good = Gaussian.of(normals(10, 4))
    with pytest.raises(ValueError, match="not all finite"):
        frechet_to(good, normals(10, 4) / torch.tensor([1, 1, 1, 0]))
    with pytest.raises(ValueError, match="too few"):
        frechet_to(good, normals(3, 4))
    with pytest.raises(ValueError, match="at least 2 pictures"):
        Gaussian.of(normals(1, 4))
    with pytest.raises(ValueError, match="not of the same extractor"):
        frechet(good, Gaussian.of(normals(10, 5)))
    with pytest.raises(ValueError, match="not of the same extractor"):
        FeatureStats.of(normals(3, 4)).merge(FeatureStats.of(normals(3, 5)))
