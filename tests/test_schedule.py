import math
from decimal import Decimal
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion.analytic import GaussianMixture
from diffusion.schedule import (
    BETAS,
    SIGMA_CEILING,
    SPACINGS,
    alpha_bar_of_sigma,
    betas_of_sigmas,
    check_betas,
    check_schedule,
    cosine_betas,
    exponential_sigmas,
    karras_sigmas,
    leading_t,
    linear_betas,
    linspace_t,
    log_normal_sigma,
    log_snr_of_sigma,
    sigma_of_alpha_bar,
    sigma_of_log_snr,
    sigmas_of_betas,
    source_text_betas,
    spaced_sigmas,
    trailing_t,
    uniform_t,
    uniform_t_sigma,
    zero_terminal_snr,
)

CHAINS = {
    **{name: make(1000) for name, make in BETAS.items()},
    "linear, zero SNR": zero_terminal_snr(linear_betas(1000)),
    "cosine, zero SNR": zero_terminal_snr(cosine_betas(1000)),
    "one step": torch.tensor([0.3], dtype=torch.float64),
    "nothing but noise": torch.tensor([1.0], dtype=torch.float64),
}
some_betas = st.lists(st.floats(1e-12, 1 - 1e-6), min_size=1, max_size=40).map(
    lambda values: torch.tensor(values, dtype=torch.float64)
)


def exact_alpha_bars(betas):
    """The product in exact fractions, the slow way."""
    product, out = Fraction(1), []
    for beta in betas.tolist():
        product *= 1 - Fraction(beta)
        out.append(product)
    return out


# --- beta schedules


def test_linear_betas_by_hand():
    torch.testing.assert_close(linear_betas(5, first=0.1, last=0.3), torch.tensor([0.1, 0.15, 0.2, 0.25, 0.3]).double())


def test_cosine_betas_give_the_cosine_as_alpha_bar_until_the_cap():
    n, alpha_bar = 100, alpha_bar_of_sigma(sigmas_of_betas(cosine_betas(100)))
    for t in (1, 37, 99):
        f = math.cos(math.pi / 2 * (t / n + 0.008) / 1.008) ** 2 / math.cos(math.pi / 2 * 0.008 / 1.008) ** 2
        assert alpha_bar[t - 1].item() == pytest.approx(f, rel=1e-12)
    assert cosine_betas(100)[-1] == 0.999


def test_the_source_texts_betas_are_its_formula_and_end_in_one():
    betas = source_text_betas(10)
    for t in range(1, 11):
        assert betas[t - 1].item() == pytest.approx(1 - math.cos(math.pi * t / 20) ** 2, rel=1e-14)
    assert betas[-1] == 1
    assert alpha_bar_of_sigma(sigmas_of_betas(betas))[-1] == 0


@pytest.mark.parametrize("betas", CHAINS.values(), ids=CHAINS)
def test_every_schedule_is_a_chain(betas):
    assert betas.dtype == torch.float64
    torch.testing.assert_close(check_schedule(betas), betas, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("betas", "words"),
    [
        ([], "one beta per step"),
        ([[0.1]], "one beta per step"),
        ([0.0, 0.1], "in \\(0, 1\\]"),
        ([-0.1, 0.1], "in \\(0, 1\\]"),
        ([0.1, 1.1], "in \\(0, 1\\]"),
        ([0.1, math.nan], "in \\(0, 1\\]"),
        ([0.1, 1.0, 1.0], "only the last may be 1"),
        ([0.1, 0.3, 0.2], "beta_3 = 0.2 is below beta_2 = 0.3"),
    ],
)
def test_what_is_no_schedule_is_refused(betas, words):
    with pytest.raises(ValueError, match=words):
        check_schedule(torch.tensor(betas))


def test_a_chain_may_fall_where_a_schedule_may_not():
    betas = torch.tensor([0.1, 0.3, 0.2])
    assert torch.equal(check_betas(betas), betas.double())
    assert sigmas_of_betas(betas)[-1].item() == pytest.approx(math.sqrt(1 / (0.9 * 0.7 * 0.8) - 1))


@pytest.mark.parametrize("make", [linear_betas, cosine_betas])
def test_zero_terminal_snr_is_linear_in_the_root_of_alpha_bar(make):
    before, after = (alpha_bar_of_sigma(sigmas_of_betas(b)).sqrt() for b in (make(50), zero_terminal_snr(make(50))))
    assert after[-1] == 0
    assert zero_terminal_snr(make(50))[-1] == 1
    assert after[0].item() == pytest.approx(before[0].item(), rel=1e-14)
    slope = after.diff() / before.diff()
    torch.testing.assert_close(slope, slope[:1].expand(49), rtol=1e-10, atol=0)


def test_zero_terminal_snr_leaves_a_chain_that_has_it():
    betas = source_text_betas(1000)
    assert torch.equal(zero_terminal_snr(betas), betas)
    with pytest.raises(ValueError, match="one step"):
        zero_terminal_snr(torch.tensor([0.5]))


# --- conversions


@pytest.mark.parametrize("betas", CHAINS.values(), ids=CHAINS)
def test_alpha_bar_is_the_exact_product_to_the_last_digits(betas):
    """Against exact fractions: alpha_bar and what is missing to 1, each to 12 digits of its own, underflow included."""
    alpha_bar, missing = (alpha_bar_of_sigma(s) for s in (sigmas_of_betas(betas), 1 / sigmas_of_betas(betas)))
    for i, product in enumerate(exact_alpha_bars(betas[:150])):
        assert alpha_bar[i].item() == pytest.approx(float(product), rel=1e-12, abs=1e-307)
        assert missing[i].item() == pytest.approx(float(1 - product), rel=1e-12)


@pytest.mark.parametrize("betas", CHAINS.values(), ids=CHAINS)
def test_there_and_back_without_nan(betas):
    sigmas = sigmas_of_betas(betas)
    alpha_bar, log_snr = alpha_bar_of_sigma(sigmas), log_snr_of_sigma(sigmas)
    assert not torch.cat([sigmas, alpha_bar, log_snr]).isnan().any()
    if betas[-1] == 1:
        assert (sigmas[-1], alpha_bar[-1], log_snr[-1]) == (math.inf, 0, -math.inf)
    assert sigmas[:-1].isfinite().all()
    torch.testing.assert_close(betas_of_sigmas(sigmas), betas, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(sigma_of_log_snr(log_snr), sigmas, rtol=1e-12, atol=0)
    kept = alpha_bar > 1e-300
    torch.testing.assert_close(sigma_of_alpha_bar(alpha_bar)[kept], sigmas[kept], rtol=1e-9, atol=0)


@settings(max_examples=50, deadline=None)
@given(some_betas)
def test_sigma_iterates_the_forward_chain(betas):
    """1 + sigma_t^2 = (1 + sigma_{t-1}^2) / (1 - beta_t), the recursion of the definition, step by step."""
    square = 0.0
    for sigma, beta in zip(sigmas_of_betas(betas).tolist(), betas.tolist(), strict=True):
        square = (square + beta) / (1 - beta)
        assert sigma == pytest.approx(math.sqrt(square), rel=1e-11)


def test_the_ends_of_the_elementwise_conversions():
    ends = torch.tensor([0.0, 1.0, math.inf], dtype=torch.float64)
    assert alpha_bar_of_sigma(ends).tolist() == [1, 0.5, 0]
    assert log_snr_of_sigma(ends).tolist() == [math.inf, 0, -math.inf]
    assert sigma_of_alpha_bar(torch.tensor([1.0, 0.5, 0.0])).tolist() == [0, 1, math.inf]
    assert sigma_of_log_snr(-torch.tensor([-math.inf, 0.0, math.inf])).tolist() == [0, 1, math.inf]
    assert sigma_of_alpha_bar(alpha_bar_of_sigma(torch.tensor(1e150, dtype=torch.float64))).item() == pytest.approx(
        1e150
    )
    with pytest.raises(ValueError, match="from 0 to 1"):
        sigma_of_alpha_bar(torch.tensor([1.5]))


def test_the_source_texts_chain_is_representable_where_its_alpha_bar_is_not():
    """alpha_bar_999 of 1000 is 3.5e-599: 0 in float64, while sigma and log-SNR still have their digits."""
    exact = math.prod((Decimal(1) - Decimal(beta) for beta in source_text_betas(1000)[:-1].tolist()), start=Decimal(1))
    sigma = sigmas_of_betas(source_text_betas(1000))[-2]
    assert exact < Decimal("1e-590")
    assert alpha_bar_of_sigma(sigma) == 0
    assert log_snr_of_sigma(sigma).item() == pytest.approx(float(exact.ln()), rel=1e-12)


def test_a_chain_of_some_levels_has_the_same_marginals():
    sigmas = sigmas_of_betas(cosine_betas(1000))
    torch.testing.assert_close(sigmas_of_betas(betas_of_sigmas(sigmas[9:1000:110])), sigmas[9:1000:110])
    with pytest.raises(ValueError, match="increase"):
        betas_of_sigmas(sigmas.flip(0))


# --- levels for samplers


def test_karras_sigmas_are_equally_spaced_in_their_root():
    sigmas = karras_sigmas(10, sigma_min=0.01, sigma_max=50.0, rho=5.0)
    assert sigmas.shape == (11,)
    assert sigmas[0].item() == pytest.approx(50.0)
    assert sigmas[-2].item() == pytest.approx(0.01)
    assert sigmas[-1] == 0
    roots = sigmas[:-1] ** (1 / 5.0)
    torch.testing.assert_close(roots.diff(), roots.diff()[:1].expand(9))


def test_exponential_sigmas_are_equally_spaced_in_log_snr():
    sigmas = exponential_sigmas(10, sigma_min=0.01, sigma_max=50.0)
    assert sigmas.shape == (11,)
    assert sigmas[0].item() == pytest.approx(50.0)
    assert sigmas[-2].item() == pytest.approx(0.01)
    assert sigmas[-1] == 0
    steps = log_snr_of_sigma(sigmas[:-1]).diff()
    torch.testing.assert_close(steps, torch.full((9,), 2 * math.log(5000) / 9, dtype=torch.float64))


def test_exponential_is_karras_with_an_endless_rho():
    exponential, karras = (
        exponential_sigmas(7, sigma_min=0.1, sigma_max=9.0),
        karras_sigmas(7, sigma_min=0.1, sigma_max=9.0, rho=1e6),
    )
    torch.testing.assert_close(exponential, karras, rtol=1e-4, atol=0)


@pytest.mark.parametrize("spacing", [karras_sigmas, exponential_sigmas])
def test_one_level_is_refused(spacing):
    with pytest.raises(ValueError, match="at least 2"):
        spacing(1, sigma_min=0.1, sigma_max=1.0)


@pytest.mark.parametrize("spacing", SPACINGS.values(), ids=SPACINGS)
def test_spacings_are_steps_of_the_chain_and_all_of_them_is_all(spacing):
    for length in (1, 10, 999):
        assert spacing(length, length).tolist() == list(range(length, 0, -1))
        for n in range(1, length + 1):
            t = spacing(n, length)
            assert t.shape == (n,)
            assert t.dtype == torch.int64
            assert (t.diff() < 0).all()
            assert 1 <= t[-1] <= t[0] <= length
    with pytest.raises(ValueError, match="from 1 to 10"):
        spacing(11, 10)
    with pytest.raises(ValueError, match="from 1 to 10"):
        spacing(0, 10)


def test_spacings_by_hand():
    """[Lin et al. 2024, Table 2]: T = 1000 in 10 steps."""
    assert leading_t(10, 1000).tolist() == [901, 801, 701, 601, 501, 401, 301, 201, 101, 1]
    assert linspace_t(10, 1000).tolist() == [1000, 889, 778, 667, 556, 445, 334, 223, 112, 1]
    assert trailing_t(10, 1000).tolist() == [1000, 900, 800, 700, 600, 500, 400, 300, 200, 100]


@pytest.mark.parametrize("name", SPACINGS)
def test_spacings_equal_diffusers_for_every_number_of_steps(name):
    """Exactly.  For some n its trailing spacing has one step too many, timestep -1: that one we lack."""
    diffusers = pytest.importorskip("diffusers")
    surplus = 0
    for scheduler in (
        diffusers.DDPMScheduler(num_train_timesteps=1000, timestep_spacing=name),
        diffusers.DDIMScheduler(num_train_timesteps=999, timestep_spacing=name, steps_offset=0),
    ):
        length = scheduler.config.num_train_timesteps
        for n in range(1, length + 1):
            scheduler.set_timesteps(n)
            theirs = (scheduler.timesteps + 1).tolist()
            surplus += len(theirs) - n
            assert theirs[n:] in ([], [0])
            assert SPACINGS[name](n, length).tolist() == theirs[:n]
    assert (surplus > 0) == (name == "trailing")


@pytest.mark.parametrize("name", ["leading", "linspace"])
def test_multistep_solvers_of_diffusers_take_one_more_without_the_last(name):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DPMSolverMultistepScheduler(timestep_spacing=name, steps_offset=0)
    for n in (5, 10, 24, 50):
        scheduler.set_timesteps(n)
        assert SPACINGS[name](n + 1, 1000)[:-1].tolist() == (scheduler.timesteps + 1).tolist()


@pytest.mark.parametrize(
    ("betas", "arguments"),
    [
        (linear_betas(1000), {"beta_schedule": "linear"}),
        (cosine_betas(1000), {"beta_schedule": "squaredcos_cap_v2"}),
        (zero_terminal_snr(linear_betas(1000)), {"beta_schedule": "linear", "rescale_betas_zero_snr": True}),
        (source_text_betas(1000), {"trained_betas": source_text_betas(1000).tolist()}),
    ],
    ids=["linear", "cosine", "zero SNR", "source text"],
)
def test_betas_and_alpha_bars_equal_diffusers(betas, arguments):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=1000, **arguments)
    torch.testing.assert_close(betas.float(), scheduler.betas, rtol=0, atol=1e-5)
    alpha_bar = alpha_bar_of_sigma(sigmas_of_betas(betas))
    torch.testing.assert_close(alpha_bar.float(), scheduler.alphas_cumprod, rtol=0, atol=1e-5)


def test_the_rescaling_equals_diffusers_in_float64():
    """Its function computes in whatever it is given."""
    ddpm = pytest.importorskip("diffusers.schedulers.scheduling_ddpm")
    for betas in (linear_betas(1000), cosine_betas(1000)):
        torch.testing.assert_close(
            zero_terminal_snr(betas), ddpm.rescale_zero_terminal_snr(betas.clone()), rtol=0, atol=1e-9
        )


def test_spaced_sigmas_are_the_chains_own():
    sigmas, t = sigmas_of_betas(linear_betas(1000)), trailing_t(8, 1000)
    spaced = spaced_sigmas(linear_betas(1000), t)
    assert spaced.tolist() == [*(sigmas[i - 1].item() for i in t), 0]
    with pytest.raises(ValueError, match="decrease"):
        spaced_sigmas(linear_betas(1000), t.flip(0))
    with pytest.raises(ValueError, match="steps 1 to 1000"):
        spaced_sigmas(linear_betas(1000), torch.tensor([1001]))
    with pytest.raises(ValueError, match="steps 1 to 1000"):
        spaced_sigmas(linear_betas(1000), torch.tensor([0]))


def test_a_chain_that_ends_in_nothing_starts_at_the_ceiling():
    betas = zero_terminal_snr(linear_betas(1000))
    spaced = spaced_sigmas(betas, trailing_t(50, 1000))
    assert spaced[0] == SIGMA_CEILING
    torch.testing.assert_close(spaced[1:-1], sigmas_of_betas(betas)[trailing_t(50, 1000)[1:] - 1])
    # T is at inf, and T - 1 and T - 2 (15406 and 7668) lie above the ceiling too: one level for the three
    assert len(spaced_sigmas(betas, trailing_t(1000, 1000))) == 1001 - 2 - int(sigmas_of_betas(betas)[-4] > 4096)
    assert spaced_sigmas(betas, trailing_t(50, 1000), ceiling=80.0)[0] == 80


def test_most_of_the_source_texts_chain_lies_above_the_ceiling():
    """alpha_bar is below one half at t = 94 of 1000; from t = 271 on, sigma is above 4096 and the levels are one."""
    sigmas = sigmas_of_betas(source_text_betas(1000))
    assert int((sigmas < 1).sum()) == 93
    assert int((sigmas < SIGMA_CEILING).sum()) == 270
    assert len(spaced_sigmas(source_text_betas(1000), trailing_t(50, 1000))) == 15
    assert len(spaced_sigmas(cosine_betas(1000), trailing_t(50, 1000))) == 51


MIXTURE = GaussianMixture(
    weights=torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64),
    means=torch.tensor([[-0.9], [0.3], [0.8]], dtype=torch.float64),
    stds=torch.tensor([0.1, 0.2, 0.0], dtype=torch.float64),
)


def total_variation_of_the_start(sigma, center):
    """Between p(x; sigma) of the mixture and N(center, sigma^2), by integration."""
    x = torch.linspace(-9, 9, 20_001, dtype=torch.float64) * sigma
    exact = MIXTURE.log_density(x[:, None], torch.full_like(x, sigma)).exp()
    start = torch.distributions.Normal(center, sigma).log_prob(x).exp()
    return torch.trapezoid((exact - start).abs(), x).item() / 2


def test_starting_below_infinity_costs_what_spaced_sigmas_says():
    weights, means, stds = MIXTURE.weights, MIXTURE.means[:, 0], MIXTURE.stds
    normal = torch.distributions.Normal(0.0, 1.0)
    ratio = torch.where(stds > 0, means / stds.clamp(min=1e-9), 0)
    folded = stds * math.sqrt(2 / math.pi) * (-(ratio**2) / 2).exp() + means.abs() * (2 * normal.cdf(ratio.abs()) - 1)
    expected_norm = (weights * torch.where(stds > 0, folded, means.abs())).sum().item()
    mean = (weights * means).sum().item()
    for sigma in (2.0, 20.0, 200.0):
        bound = expected_norm / (sigma * math.sqrt(2 * math.pi))
        assert 0.1 * bound < total_variation_of_the_start(sigma, 0.0) < bound
    # the exact cost of one point at distance 1: the bound is tight
    assert 2 * normal.cdf(torch.tensor(1 / 400.0)).item() - 1 == pytest.approx(
        1 / 200 / math.sqrt(2 * math.pi), rel=1e-3
    )
    centred = [total_variation_of_the_start(sigma, mean) for sigma in (5.0, 10.0, 20.0)]
    assert [math.log2(a / b) for a, b in pairwise(centred)] == pytest.approx([2, 2], abs=0.05)


# --- densities for training


def test_log_normal_sigma_has_its_quantiles():
    median, one_above = log_normal_sigma(torch.tensor([0.5, 0.8413447460685429]), mean=-1.0, std=1.5)
    assert median.item() == pytest.approx(math.exp(-1.0))
    assert one_above.item() == pytest.approx(math.exp(0.5), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uniform_t_gives_every_step_its_share(dtype):
    u = ((torch.arange(7000) + 0.5) / 7000).to(dtype)
    assert uniform_t(u, 7).bincount().tolist() == [0] + [1000] * 7
    ends = torch.tensor([2.0**-24, 1 - 2.0**-24], dtype=dtype)
    assert uniform_t(ends, 1000).tolist() == [1, 1000]
    assert uniform_t(torch.ones(1, dtype=dtype), 10).item() == 10


def test_uniform_t_sigma_is_the_chains_level_and_finite():
    u = ((torch.arange(10) + 0.5) / 10).view(2, 5)
    drawn = uniform_t_sigma(u, betas=linear_betas(10, first=0.1, last=0.5))
    torch.testing.assert_close(drawn, sigmas_of_betas(linear_betas(10, first=0.1, last=0.5)).float().view(2, 5))
    assert uniform_t_sigma(torch.tensor([0.95]), betas=source_text_betas(10)).item() == SIGMA_CEILING
