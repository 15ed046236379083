"""The chain against its definition: by hand, by Bayes on a grid, by iteration, and against known likelihoods."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion.analytic import GaussianMixture
from diffusion.process import (
    Chain,
    decodable,
    decoder_nll,
    diffuse,
    forward_step,
    gaussian_kl,
    l_simple,
    l_weighted,
    posterior_mean,
    prior_kl,
    reverse_mean,
    reverse_step,
    transition_kl,
    variational_bound,
)
from diffusion.random import Stream, normal
from diffusion.schedule import (
    SIGMA_CEILING,
    betas_of_sigmas,
    cosine_betas,
    exponential_sigmas,
    linear_betas,
    source_text_betas,
    zero_terminal_snr,
)

F64 = torch.float64
CHAINS = {
    "linear": Chain(linear_betas(20, first=0.01, last=0.4)),
    "cosine": Chain(cosine_betas(20)),
    "source text": Chain(source_text_betas(20)),
    "zero SNR": Chain(zero_terminal_snr(linear_betas(20, first=0.01, last=0.4))),
}
every_chain = pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS)


def steps(t: int, batch: int = 1) -> torch.Tensor:
    return torch.full((batch,), t)


def noises(seed: int, *shape: int) -> torch.Tensor:
    return normal(seed, Stream.NOISE, torch.arange(shape[0]), shape[1:]).double()


# --- the source text's worked example

EXAMPLE_X0 = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]], dtype=F64)
EXAMPLE = Chain(torch.tensor([0.1, 0.2, 0.3], dtype=F64))
EXAMPLE_NOISES = torch.tensor(
    [[[[0.2, -0.1], [0.3, -0.4]]], [[[-0.1, 0.2], [0.4, -0.3]]], [[[0.4, -0.2], [-0.1, 0.5]]]], dtype=F64
)
# x_1 = 0.948683 x_0 + 0.316228 n_1, x_2 = 0.894427 x_1 + 0.447214 n_2, x_3 = 0.836660 x_2 + 0.547723 n_3, by hand
EXAMPLE_RIGHT = [
    [[1.0119, 1.8657], [2.9409, 3.6682]],
    [[0.8604, 1.7582], [2.8093, 3.1468]],
    [[0.9389, 1.3615], [2.2957, 2.9067]],
]
EXAMPLE_PRINTED = [
    [[1.09, 2.18], [3.27, 4.36]],
    [[1.17, 2.34], [3.51, 4.68]],
    [[1.57, 2.94], [4.21, 5.88]],
]


def test_the_worked_example_by_step():
    z = EXAMPLE_X0
    for t, right in enumerate(EXAMPLE_RIGHT, start=1):
        z = forward_step(z, steps(t), EXAMPLE_NOISES[t - 1], EXAMPLE)
        torch.testing.assert_close(z[0], torch.tensor(right, dtype=F64), rtol=0, atol=5e-5)


def test_the_worked_example_in_closed_form():
    """alpha_bar = 0.9, 0.72, 0.504, and the noise that the three make together."""
    for t, right in enumerate(EXAMPLE_RIGHT, start=1):
        alpha_bar = [1, 0.9, 0.72, 0.504]
        shares = [math.sqrt(EXAMPLE.betas[s - 1] * alpha_bar[t] / alpha_bar[s]) for s in range(1, t + 1)]
        assert sum(share**2 for share in shares) == pytest.approx(1 - alpha_bar[t])
        together = sum(share * noise for share, noise in zip(shares, EXAMPLE_NOISES, strict=False))
        z = diffuse(EXAMPLE_X0, steps(t), together / math.sqrt(1 - alpha_bar[t]), EXAMPLE)
        torch.testing.assert_close(z[0], torch.tensor(right, dtype=F64), rtol=0, atol=5e-5)


def test_the_worked_examples_printed_values_do_not_follow():
    """No rounding explains them: from x_1 on they are further off than half a unit of their last digit, in every pixel.

    The printed x_1 is 1.09 x_0 and x_2 is 1.17 x_0: larger than x_0, where sqrt(1 - beta) only shrinks, and without the
    noises, which differ in sign.  Nor does a printed line follow from the printed line before it.
    """
    printed = torch.tensor(EXAMPLE_PRINTED, dtype=F64)[:, None]
    z, from_printed = EXAMPLE_X0, EXAMPLE_X0
    for t in (1, 2, 3):
        noise = EXAMPLE_NOISES[t - 1]
        z, step = (forward_step(before, steps(t), noise, EXAMPLE) for before in (z, from_printed))
        from_printed = printed[t - 1]
        assert ((printed[t - 1] - z).abs() > 0.005).all()
        assert ((printed[t - 1] - step).abs() > 0.005).all()
    torch.testing.assert_close(printed[0], 1.09 * EXAMPLE_X0)
    torch.testing.assert_close(printed[1], 1.17 * EXAMPLE_X0)


# --- forward


@every_chain
def test_iterated_equals_closed_form_for_given_noises(chain):
    """z_t = sqrt(alpha_bar_t) x0 + sum_s sqrt(beta_s prod_{s < r <= t} (1 - beta_r)) n_s."""
    x0, drawn = noises(1, 3, 2, 4), noises(2, 20, 3, 2, 4)
    z = x0
    for t in range(1, 21):
        z = forward_step(z, steps(t, 3), drawn[t - 1], chain)
        tails = [math.prod(1 - b for b in chain.betas[s:t].tolist()) for s in range(1, t + 1)]
        together = sum(math.sqrt(chain.betas[s] * tails[s]) * drawn[s] for s in range(t))
        alpha_bar = math.prod(1 - b for b in chain.betas[:t].tolist())
        torch.testing.assert_close(z, math.sqrt(alpha_bar) * x0 + together)
        torch.testing.assert_close(diffuse(x0, steps(t, 3), together / math.sqrt(1 - alpha_bar), chain), z)


@every_chain
def test_iterated_and_closed_form_have_the_same_moments(chain):
    """Exactly, from both functions: mean and variance are affine in what goes in."""
    one, zero = torch.ones(1, 1, dtype=F64), torch.zeros(1, 1, dtype=F64)
    mean, variance = 3.0, 0.0
    for t in range(1, 21):
        keep, spread = (forward_step(a, steps(t), b, chain).item() for a, b in ((one, zero), (zero, one)))
        mean, variance = keep * mean, keep**2 * variance + spread**2
        assert mean == pytest.approx(diffuse(3 * one, steps(t), zero, chain).item(), rel=1e-12, abs=1e-15)
        assert variance == pytest.approx(diffuse(zero, steps(t), one, chain).item() ** 2, rel=1e-12)


def test_iterated_draws_are_the_closed_forms_gaussian():
    """Kolmogorov-Smirnov on 250,000 draws: 1.95 is exceeded by one seed in 1000, and alpha_bar off by 0.014 is seen."""
    n = 250_000
    z = torch.full((n, 1), 0.7, dtype=F64)
    for t in (1, 2, 3):
        z = forward_step(z, steps(t, n), noises(t, n, 1), EXAMPLE)

    def distance(alpha_bar: float) -> float:
        u = torch.special.ndtr((z[:, 0].sort().values - 0.7 * math.sqrt(alpha_bar)) / math.sqrt(1 - alpha_bar))
        grid = torch.arange(n + 1, dtype=F64) / n
        return torch.maximum((u - grid[:-1]).abs().max(), (u - grid[1:]).abs().max()).item() * math.sqrt(n)

    assert distance(0.504) < 1.95
    assert distance(0.49) > 1.95  # the test can tell


def test_every_row_has_its_own_step():
    chain, x0, noise, t = CHAINS["cosine"], noises(1, 4, 2, 3), noises(2, 4, 2, 3), torch.tensor([20, 1, 7, 7])
    for function in (forward_step, diffuse):
        rows = [function(x0[i : i + 1], t[i : i + 1], noise[i : i + 1], chain) for i in range(4)]
        assert torch.equal(function(x0, t, noise, chain), torch.cat(rows))
    with pytest.raises(ValueError, match="steps 1 to 20"):
        diffuse(x0, torch.tensor([0, 1, 2, 3]), noise, chain)
    with pytest.raises(ValueError, match="steps 1 to 20"):
        forward_step(x0, torch.tensor([1, 2, 3, 21]), noise, chain)


# --- posterior and reverse


@every_chain
@pytest.mark.parametrize("t", [2, 3, 11, 19, 20])
def test_the_posterior_is_bayes_on_a_grid(chain, t):
    """q(z_{t-1} given z_t, x0) is proportional to q(z_t given z_{t-1}) q(z_{t-1} given x0), each from its definition."""
    grid = torch.linspace(-12, 12, 40_001, dtype=F64)
    x0, z = 0.8, -0.4
    alpha_bar = math.prod(1 - b for b in chain.betas[: t - 1].tolist())
    beta = chain.betas[t - 1].item()
    density = torch.exp(
        -((z - math.sqrt(1 - beta) * grid) ** 2) / (2 * beta)
        - (grid - math.sqrt(alpha_bar) * x0) ** 2 / (2 * (1 - alpha_bar))
    )
    density /= density.sum()
    mean = (density * grid).sum()
    ours = posterior_mean(torch.tensor([[z]], dtype=F64), torch.tensor([[x0]], dtype=F64), steps(t), chain)
    assert ours.item() == pytest.approx(mean.item(), abs=1e-10)
    variance = (density * (grid - mean) ** 2).sum().item()
    assert chain.posterior_variances[t - 1].item() == pytest.approx(variance, rel=1e-9)


@every_chain
def test_the_posterior_is_x0_at_the_first_step(chain):
    x0 = noises(1, 2, 3)
    assert chain.posterior_variances[0] == 0
    torch.testing.assert_close(posterior_mean(noises(2, 2, 3), x0, steps(1, 2), chain), x0)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(1e-9, 0.999), min_size=2, max_size=30), st.integers(0, 2**20))
def test_forward_and_posterior_tell_the_same_joint(values, seed):
    """q(z_t given x0) pushed through the posterior is q(z_{t-1} given x0): the law that makes sampling exact."""
    chain, t = Chain(torch.tensor(values, dtype=F64)), seed % (len(values) - 1) + 2
    of_x0, of_z = chain.posterior_of_x0[t - 1], chain.posterior_of_z[t - 1]
    torch.testing.assert_close(of_x0 + of_z * chain.signal[t - 1], chain.signal[t - 2], rtol=1e-9, atol=1e-12)
    variance = of_z**2 * chain.spread[t - 1] ** 2 + chain.posterior_variances[t - 1]
    torch.testing.assert_close(variance, chain.spread[t - 2] ** 2, rtol=1e-9, atol=0)


@every_chain
def test_the_epsilon_form_is_the_x0_form(chain):
    x0, noise = noises(1, 5, 2, 2), noises(2, 5, 2, 2)
    for t in range(1, 21):
        z = diffuse(x0, steps(t, 5), noise, chain)
        wanted = posterior_mean(z, x0, steps(t, 5), chain)
        if chain.betas[t - 1] == 1:  # epsilon is z: x0 must come from elsewhere
            torch.testing.assert_close(z, noise)
            torch.testing.assert_close(reverse_mean(z, noise, steps(t, 5), chain, x0_mean=x0), wanted)
        else:
            torch.testing.assert_close(reverse_mean(z, noise, steps(t, 5), chain), wanted, rtol=1e-9, atol=1e-9)


def test_the_step_out_of_pure_noise_knows_the_mean_alone():
    """beta_T = 1: finite, no matter what epsilon says, with a finite gradient; sqrt(alpha_bar_{T-1}) x0_mean."""
    chain, z = Chain(source_text_betas(4)), noises(1, 2, 3)
    epsilon = noises(2, 2, 3).requires_grad_()
    mean = reverse_mean(z, epsilon, steps(4, 2), chain, x0_mean=0.5)
    alpha_bar = math.prod(math.cos(math.pi * t / 8) ** 2 for t in (1, 2, 3))
    torch.testing.assert_close(mean, torch.full((2, 3), math.sqrt(alpha_bar) * 0.5, dtype=F64))
    (gradient,) = torch.autograd.grad(mean.sum(), epsilon)
    assert torch.equal(gradient, torch.zeros(2, 3, dtype=F64))
    assert chain.posterior_variances[-1].item() == pytest.approx(1 - alpha_bar)
    assert not reverse_mean(z, z, steps(4, 2), chain).any()


def test_the_first_step_adds_no_noise():
    mean, noise, chain = noises(1, 2, 3), noises(2, 2, 3), CHAINS["linear"]
    for variances in (chain.betas, chain.posterior_variances):
        assert torch.equal(reverse_step(mean, steps(1, 2), noise, variances), mean)
        wanted = mean + variances[4].sqrt() * noise
        torch.testing.assert_close(reverse_step(mean, steps(5, 2), noise, variances), wanted)


def generated(chain: Chain, variances: torch.Tensor, *, mean: float, std: float) -> tuple[float, float]:
    """Mean and variance of what the reverse chain makes of N(0, 1) with the exact epsilon of x0 ~ N(mean, std^2).

    Each step is affine in z and noise, so that its answers to (0, 0), (1, 0) and (0, 1) say all.
    """
    z, noise = torch.tensor([[0, 0], [1, 0], [0, 1]], dtype=F64)[:, :, None].unbind(1)
    center, variance = 0.0, 1.0
    for t in range(len(chain.betas), 0, -1):
        signal, spread = chain.signal[t - 1], chain.spread[t - 1]
        epsilon = spread * (z - signal * mean) / ((signal * std) ** 2 + spread**2)
        down = reverse_step(reverse_mean(z, epsilon, steps(t, 3), chain, x0_mean=mean), steps(t, 3), noise, variances)
        offset, slope, width = (down[0].item(), *(down[1:] - down[0]).flatten().tolist())
        center, variance = offset + slope * center, slope**2 * variance + width**2
    return center, variance


@pytest.mark.parametrize(("make", "order"), [(cosine_betas, 1), (source_text_betas, 2 / 3)])
@pytest.mark.parametrize("variances", ["betas", "posterior_variances"])
def test_the_reverse_chain_generates_the_data_as_it_gets_longer(make, order, variances):
    """x0 ~ N(0.6, 0.5^2) comes back; the error of its variance falls like 1 / T with either variance.

    The source text's chain spends only about T^(2/3) steps before all is noise (docs/source-text.md): hence 2 / 3.
    """

    def error(n: int) -> float:
        chain = Chain(make(n))
        mean, variance = generated(chain, getattr(chain, variances), mean=0.6, std=0.5)
        assert mean == pytest.approx(0.6, abs=1e-6)
        return abs(variance - 0.25)

    short, long = error(100), error(200)
    assert long < 0.03
    assert math.log2(short / long) == pytest.approx(order, abs=0.1)


def test_each_variance_is_exact_for_its_own_data():
    """beta_t for x0 ~ N(0, 1), the posterior's for a single x0: no error at any length.  [DDPM, Sec. 3.2]"""
    chain = CHAINS["zero SNR"]
    for std, variances in ((1.0, chain.betas), (0.0, chain.posterior_variances)):
        mean, variance = generated(chain, variances, mean=0.0, std=std)
        assert mean == pytest.approx(0, abs=1e-12)
        # the last step draws no noise: beta_1 is missing
        assert variance == pytest.approx(std**2 * (1 - chain.betas[0].item()), abs=1e-12)


def test_without_noise_every_picture_would_be_the_mean():
    """The source text's reverse step as it is printed: the variance of the data is lost."""
    chain = Chain(cosine_betas(100))
    mean, variance = generated(chain, torch.zeros_like(chain.betas), mean=0.6, std=0.5)
    assert mean == pytest.approx(0.6, abs=1e-6)
    assert variance < 1e-5 * 0.25


@pytest.mark.parametrize("name", ["linear", "squaredcos_cap_v2", "rescaled", "source text"])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_steps_and_variances_equal_diffusers(name, variance):
    """Every step on the same noise, within 1e-9: its tables are made float64, of its own float32 betas."""
    diffusers = pytest.importorskip("diffusers")
    arguments = {
        "rescaled": {"rescale_betas_zero_snr": True},
        "source text": {"trained_betas": source_text_betas(100).tolist()},
    }.get(name, {"beta_schedule": name})
    for prediction in ("epsilon", "sample"):
        scheduler = diffusers.DDPMScheduler(
            100, clip_sample=False, prediction_type=prediction, variance_type=variance, **arguments
        )
        chain = Chain(scheduler.betas)
        scheduler.alphas_cumprod = (1 - chain.betas).cumprod(0)
        variances = chain.betas if variance == "fixed_large" else chain.posterior_variances
        z, out, noise = (noises(seed, 2, 3, 4, 4) for seed in (3, 4, 5))
        for t in range(1, 101):
            added = scheduler.add_noise(out, noise, steps(t - 1, 2))
            torch.testing.assert_close(diffuse(out, steps(t, 2), noise, chain), added, rtol=0, atol=1e-9)
            if prediction == "epsilon" and chain.signal[t - 1] < 1e-6:
                continue  # theirs divides by sqrt(alpha_bar), and subtracts
            drawn = torch.randn(z.shape, generator=torch.Generator().manual_seed(t), dtype=F64)
            theirs = scheduler.step(out, t - 1, z, generator=torch.Generator().manual_seed(t)).prev_sample
            mean = (reverse_mean if prediction == "epsilon" else posterior_mean)(z, out, steps(t, 2), chain)
            ours = reverse_step(mean, steps(t, 2), drawn, variances)
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
            if t > 1:
                theirs = scheduler._get_variance(t - 1).item()
                assert variances[t - 1].item() == pytest.approx(theirs, abs=1e-9)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_steps_equal_diffusers_in_its_own_float32(variance):
    """Within 1e-5 but for the first steps, where its 1 - alpha_bar has lost digits."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(clip_sample=False, variance_type=variance)
    chain = Chain(linear_betas(1000))
    z, out = noises(3, 2, 3, 4, 4).float(), noises(4, 2, 3, 4, 4).float()
    for t in (100, 300, 500, 700, 1000):
        theirs = scheduler.step(out, t - 1, z, generator=torch.Generator().manual_seed(t)).prev_sample
        drawn = torch.randn(z.shape, generator=torch.Generator().manual_seed(t))
        variances = chain.betas if variance == "fixed_large" else chain.posterior_variances
        ours = reverse_step(reverse_mean(z, out, steps(t, 2), chain), steps(t, 2), drawn, variances)
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


# --- losses over the chain


@every_chain
def test_l_simple_is_the_error_of_epsilon(chain):
    """From the epsilon of a denoiser that knows nothing, by hand: x = sqrt(1 + sigma^2) z and (x - D) / sigma."""
    x0, noise, t = noises(1, 20, 2, 3), noises(2, 20, 2, 3), torch.arange(1, 21)
    sigma = chain.sigmas.view(20, 1, 1)
    wrong = 0.3 * noises(3, 20, 2, 3)
    losses = l_simple(lambda x, sigma: x0 + wrong, x0, t, noise, chain)
    epsilon = (x0 + sigma * noise - (x0 + wrong)) / sigma
    wanted = (noise - epsilon).square().mean(dim=(1, 2)).nan_to_num(0.0)  # inf / inf at the end of a chain to zero SNR
    torch.testing.assert_close(losses, wanted)
    weights = torch.linspace(0, 2, 20, dtype=F64)
    weighted = l_weighted(lambda x, sigma: x0 + wrong, x0, t, noise, chain, weights)
    torch.testing.assert_close(weighted, weights * wanted)


@every_chain
def test_the_denoiser_is_asked_in_its_own_coordinates(chain):
    x0, noise, t, asked = noises(1, 20, 2, 3), noises(2, 20, 2, 3), torch.arange(1, 21), []

    def denoise(x, sigma):
        asked.append((x, sigma))
        return x0

    assert not l_simple(denoise, x0, t, noise, chain).any()
    ((x, sigma),) = asked
    torch.testing.assert_close(sigma, chain.sigmas.clamp(max=SIGMA_CEILING))
    below = (chain.sigmas <= SIGMA_CEILING).nonzero().flatten()
    torch.testing.assert_close(x[below], (x0 + sigma.view(-1, 1, 1) * noise)[below])
    if chain.betas[-1] == 1:
        torch.testing.assert_close(x[-1], math.sqrt(1 + SIGMA_CEILING**2) * noise[-1])


def test_l_simple_has_a_gradient_and_the_type_of_the_picture():
    scale = torch.tensor(0.5, requires_grad=True)
    x0, t = noises(1, 4, 1, 2, 2).float(), torch.tensor([1, 5, 19, 20])
    losses = l_simple(lambda x, sigma: scale * x, x0, t, torch.ones_like(x0), CHAINS["source text"])
    assert losses.dtype == torch.float32
    losses.sum().backward()
    assert scale.grad.isfinite()
    with pytest.raises(ValueError, match="steps 1 to 20"):
        l_simple(lambda x, sigma: x, x0, t - 1, torch.ones_like(x0), CHAINS["source text"])


# --- the bound


def test_gaussian_kl_is_its_integral():
    x = torch.linspace(-30, 30, 200_001, dtype=F64)
    q, p = torch.distributions.Normal(0.3, 0.7), torch.distributions.Normal(-1.0, 1.9)
    integral = torch.trapezoid(q.log_prob(x).exp() * (q.log_prob(x) - p.log_prob(x)), x)
    mean, variance, other = torch.tensor([[0.3, 0.3]]).double(), torch.tensor([0.49]), torch.tensor([1.9**2])
    kl = gaussian_kl(mean, variance.double(), torch.full((1, 2), -1.0), other.double())
    assert kl.item() == pytest.approx(2 * integral.item(), rel=1e-6)
    assert gaussian_kl(mean, variance, mean, variance).item() == 0


@every_chain
def test_the_prior_term_by_hand(chain):
    x0 = noises(1, 3, 2, 4)
    alpha_bar = math.prod(1 - b for b in chain.betas.tolist())
    wanted = (alpha_bar * (x0**2 - 1) - (math.log1p(-alpha_bar) if alpha_bar else 0)).sum(dim=(1, 2)) / 2
    torch.testing.assert_close(prior_kl(x0, chain), wanted, rtol=1e-8, atol=1e-15)
    assert prior_kl(x0, chain).any() == (chain.betas[-1] < 1)


@every_chain
def test_transitions_are_l_weighted_with_ddpms_own_weight(chain):
    """beta_t^2 / (2 v_t (1 - beta_t) (1 - alpha_bar_t)) of the error of epsilon [DDPM, Eq. 12] plus what no network
    changes; and, with the posterior's variances, VDM's difference of SNRs."""
    x0, noise = noises(1, 18, 2, 3), noises(2, 18, 2, 3)
    t = torch.arange(2, 20)  # at 20 the first form is 0 / 0 in two of the chains

    def denoise(x, sigma):
        return x / (1 + sigma.view(-1, 1, 1) ** 2)

    for variances in (chain.betas, chain.posterior_variances):
        kl = transition_kl(denoise, x0, t, noise, chain, variances)
        weights = chain.betas**2 / (2 * variances * (1 - chain.betas) * chain.spread**2)
        ratio = (chain.posterior_variances / variances)[t - 1]
        rest = 6 * (ratio - 1 - ratio.log()) / 2
        torch.testing.assert_close(kl, 6 * l_weighted(denoise, x0, t, noise, chain, weights) + rest)
    error = (denoise(x0 + chain.sigmas[t - 1].view(-1, 1, 1) * noise, chain.sigmas[t - 1]) - x0).square().sum((1, 2))
    snr = chain.sigmas**-2
    torch.testing.assert_close(kl, (snr[t - 2] - snr[t - 1]) / 2 * error)
    with pytest.raises(ValueError, match="t >= 2"):
        transition_kl(denoise, x0, t - 1, noise, chain, chain.betas)


VALUES = torch.linspace(-1, 1, 256, dtype=F64).view(256, 1)


@pytest.mark.parametrize("deviation", [0.001, 0.01, 0.5, 20.0])
@pytest.mark.parametrize("mean", [-1.3, -1.0, 0.0, 0.2, 1.0])
def test_the_decoder_is_a_distribution_of_256_values(mean, deviation):
    nll = decoder_nll(torch.full((256, 1), mean, dtype=F64), VALUES, deviation**2)
    assert nll.isfinite().all()
    assert (-nll).exp().sum().item() == pytest.approx(1, abs=1e-12)


def test_the_decoder_by_hand_and_far_in_its_tails():
    normal_ = torch.distributions.Normal(0.1, 0.25)
    for k in (0, 100, 140, 255):
        edge = VALUES[k].item()
        upper = 1.0 if k == 255 else normal_.cdf(torch.tensor(edge + 1 / 255, dtype=F64)).item()
        lower = 0.0 if k == 0 else normal_.cdf(torch.tensor(edge - 1 / 255, dtype=F64)).item()
        ours = decoder_nll(torch.full((1, 1), 0.1, dtype=F64), VALUES[k : k + 1], 0.0625).item()
        assert ours == pytest.approx(-math.log(upper - lower), rel=1e-5)
    # 1000 deviations off: ln of the density at the nearer edge, -(1 - 1/255)^2 / (2 0.001^2), leads; no inf, no 1e-12
    far = decoder_nll(torch.zeros(1, 1), torch.ones(1, 1), 1e-6).item()
    assert far == pytest.approx((254 / 255) ** 2 / 2e-6, rel=1e-4)
    assert decoder_nll(torch.zeros(1, 1), -torch.ones(1, 1), 1e-6).item() == pytest.approx(far, rel=1e-6)


def test_the_decoder_adds_over_the_picture_and_wants_256_values():
    x0 = VALUES.view(4, 64, 1, 1)
    alone = decoder_nll(0.1 * VALUES, VALUES, 0.01).view(4, 64).sum(dim=1)
    torch.testing.assert_close(decoder_nll(0.1 * x0, x0, 0.01), alone)
    assert torch.equal(decoder_nll(0.1 * x0.float(), x0.float(), 0.01) > 0, torch.ones(4).bool())
    for wrong in (VALUES + 1 / 255, VALUES * 2, VALUES / 2):
        with pytest.raises(ValueError, match="uint8 picture"):
            decoder_nll(wrong, wrong, 0.01)


# x0 ~ N(0.05, 0.015^2) rounded to uint8 is a mixture of points: its likelihood and its denoiser are known exactly.
LEVELS = VALUES[(VALUES[:, 0] - 0.05).abs() < 0.1]
MASSES = torch.exp(-decoder_nll(torch.full_like(LEVELS, 0.05), LEVELS, 0.015**2))
MASSES /= MASSES.sum()
ROUNDED = GaussianMixture(MASSES, LEVELS, torch.zeros(len(LEVELS), dtype=F64))
ENTROPY = -(MASSES * MASSES.log2()).sum().item()
NODES = torch.linspace(-7, 7, 57, dtype=F64)  # the trapezoidal rule over the noise: exact to 1e-6 bits here


def expected_bound(denoise, chain: Chain, variances: torch.Tensor) -> tuple[float, float, float]:
    """Prior, transitions and decoder in the mean over x0 and noise, by quadrature; one pixel."""
    x0 = LEVELS.repeat_interleave(len(NODES), dim=0)
    noise = NODES.repeat(len(LEVELS))[:, None]
    gauss = (-(NODES**2) / 2).exp()
    weights = torch.outer(MASSES, gauss / gauss.sum()).flatten()
    bound = variational_bound(denoise, x0, lambda t: noise, chain, variances)
    assert bound.transitions.shape == (len(x0), len(chain.betas) - 1)
    torch.testing.assert_close(bound.total, bound.prior + bound.transitions.sum(dim=1) + bound.decoder)
    return tuple(float(weights @ term) for term in (bound.prior, bound.transitions.sum(dim=1), bound.decoder))


@pytest.mark.parametrize("variances", ["betas", "posterior_variances"])
def test_the_bound_of_a_gaussian_converges_to_its_likelihood(variances):
    """From above, and its excess halves as T doubles: the error of D grows with sigma, so that the sum over the steps
    is an upper sum of the integral which is the entropy.  [VDM, Sec. 5]"""

    def excess(n: int) -> float:
        # so fine at its clean end that z_1 tells the value, which leaves nothing to the decoder
        sigmas = exponential_sigmas(n, sigma_min=5e-4, sigma_max=10.0)[:-1].flip(0)
        chain = Chain(betas_of_sigmas(sigmas))
        prior, transitions, decoder = expected_bound(ROUNDED.denoise, chain, decodable(getattr(chain, variances)))
        assert prior < 1e-4
        assert decoder < 1e-12
        return transitions + prior + decoder - ENTROPY

    short, long = excess(64), excess(128)
    assert 0 < long < 0.2 * ENTROPY
    assert math.log2(short / long) == pytest.approx(1, abs=0.12)


@pytest.mark.parametrize("make", [source_text_betas, lambda n: zero_terminal_snr(cosine_betas(n))])
def test_the_bound_holds_for_any_schedule_variance_and_denoiser(make):
    """Above the entropy, with zero terminal SNR too; and a worse denoiser has a worse bound."""
    chain = Chain(make(24))
    for variances in (chain.betas, decodable(chain.posterior_variances)):
        prior, *rest = expected_bound(ROUNDED.denoise, chain, variances)
        assert prior == 0
        assert ENTROPY < sum(rest) < 8
        worse = expected_bound(lambda x, sigma: ROUNDED.denoise(x, sigma) + 0.01, chain, variances)
        assert sum(worse) > sum(rest)


def test_the_bound_of_a_picture_is_the_mean_over_its_values():
    chain, drawn = Chain(cosine_betas(10)), noises(1, 10, 2, 3, 4, 4)
    x0 = LEVELS[torch.arange(96) % len(LEVELS)].view(2, 3, 4, 4)

    def denoise(x, sigma):
        rows = sigma.repeat_interleave(x[0].numel())
        return ROUNDED.denoise(x.reshape(-1, 1), rows).view(x.shape)

    variances = decodable(chain.posterior_variances)
    whole = variational_bound(denoise, x0, lambda t: drawn[t[0] - 1], chain, variances)
    for t in range(2, 11):  # each from its own draw
        nats = transition_kl(denoise, x0, steps(t, 2), drawn[t - 1], chain, variances)
        torch.testing.assert_close(whole.transitions[:, t - 2], nats / (48 * math.log(2)))
    alone = variational_bound(denoise, x0.reshape(96, 1), lambda t: drawn[t[0] - 1].reshape(96, 1), chain, variances)
    for term, parts in zip(whole, alone, strict=True):
        torch.testing.assert_close(term, parts.unflatten(0, (2, 48)).mean(dim=1))
    with pytest.raises(ValueError, match="decodable"):
        variational_bound(denoise, x0, lambda t: drawn[t[0] - 1], chain, chain.posterior_variances)


def test_a_condition_is_bound_beforehand():
    def denoise(x, sigma, label):
        return label.view(-1, 1).to(x).expand_as(x)

    chain, x0 = Chain(cosine_betas(3)), torch.tensor([[-1.0], [1.0]])
    bound = variational_bound(
        partial(denoise, label=torch.tensor([-1, 1])), x0, lambda t: torch.zeros_like(x0), chain, chain.betas
    )
    assert bound.transitions[:, 0].tolist() == pytest.approx(
        [bound.transitions[0, 0].item()] * 2
    )  # no error left: variances alone
    one_step = variational_bound(
        partial(denoise, label=torch.tensor([-1, 1])), x0, lambda t: x0, Chain(torch.tensor([1.0])), torch.ones(1)
    )
    assert one_step.transitions.shape == (2, 0)
    assert not one_step.prior.any()
