"""What every sampler promises: its order of convergence, its distribution, and independence of the batch."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import solve_ivp

from diffusion.analytic import GaussianMixture
from diffusion.sampler import SAMPLERS, ddim, ddpm_beta, dpmpp_2m, heun, heun_churn, run
from diffusion.schedule import karras_sigmas

DETERMINISTIC = [name for name, sampler in SAMPLERS.items() if not sampler.stochastic]
STOCHASTIC = [name for name, sampler in SAMPLERS.items() if sampler.stochastic]
PLANE = GaussianMixture(
    weights=torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64),
    means=torch.tensor([[-1.0, 0.5], [0.4, -0.6], [1.2, 0.9]], dtype=torch.float64),
    stds=torch.tensor([0.4, 0.3, 0.5], dtype=torch.float64),
)
LINE = GaussianMixture(
    weights=torch.tensor([0.35, 0.65], dtype=torch.float64),
    means=torch.tensor([[-1.0], [0.6]], dtype=torch.float64),
    stds=torch.tensor([0.25, 0.4], dtype=torch.float64),
)
HIGH, LOW = 10.0, 0.2  # where the order is measured
START = torch.linspace(-12, 12, 16, dtype=torch.float64).view(8, 2)


@pytest.fixture(scope="module")
def exact():
    """x(LOW) of dx/dsigma = (x - D) / sigma from START at HIGH, by an eighth-order Runge-Kutta method of scipy."""

    def slope(sigma, flat):
        x = torch.tensor(flat).view_as(START)
        return ((x - PLANE.denoise(x, torch.full((len(x),), sigma, dtype=x.dtype))) / sigma).numpy().ravel()

    done = solve_ivp(slope, (HIGH, LOW), START.numpy().ravel(), method="DOP853", rtol=1e-12, atol=1e-12)
    return torch.tensor(done.y[:, -1]).view_as(START)


def error(sampler, steps, exact, path):
    if path == "karras":
        sigmas = karras_sigmas(steps + 1, sigma_min=LOW, sigma_max=HIGH)[:-1]
    else:
        sigmas = torch.linspace(math.log(HIGH), math.log(LOW), steps + 1, dtype=torch.float64).exp()
    return (run(sampler(START, sigmas), PLANE.denoise) - exact).abs().max().item()


@pytest.mark.parametrize("path", ["karras", "uniform in lambda"])
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_order_of_convergence(name, path, exact):
    """Halving the steps of a nonlinear problem in the plane divides the error by 2^order."""
    order = {"ddim": 1, "heun": 2, "dpmpp_2m": 2, "unipc": 3}[name]
    coarse, fine = (error(SAMPLERS[name], steps, exact, path) for steps in (128, 256))
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.08)


def test_fine_heun_confirms_the_reference(exact):
    assert error(heun, 1000, exact, "karras") < 3e-6


SAMPLES = 20_000
# sup |F_n - F| exceeds d with probability at most 2 exp(-2 n d^2)  [Massart 1990]: the size of the test is at most 0.001,
# a distribution whose F is anywhere 0.03 away is rejected with probability at least 1 - 2 exp(-2 n (0.03 - d)^2) > 0.9999
CRITICAL = math.sqrt(math.log(2 / 0.001) / (2 * SAMPLES))


def kolmogorov_smirnov(samples):
    """sup |F_n - F| against the mixture LINE.  samples (n, 1)."""
    x = samples.sort(dim=0).values
    exact = (LINE.weights * torch.special.ndtr((x - LINE.means.T) / LINE.stds)).sum(dim=1)
    below = torch.arange(len(x), dtype=torch.float64) / len(x)
    return max((exact - below).max().item(), (below + 1 / len(x) - exact).max().item())


def drawn(sampler, steps, *, noise_scale=1.0):
    """Samples of LINE by this sampler, from the exact distribution at sigma = 10."""
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(SAMPLES, generator=generator, dtype=torch.float64)

    def noise(_):
        return torch.randn(SAMPLES, 1, generator=generator, dtype=torch.float64)

    x = LINE.sample(uniform, noise(0)) + 10 * noise(0)
    sigmas = karras_sigmas(steps, sigma_min=0.02, sigma_max=10.0)
    return run(sampler(x, sigmas, lambda i: noise_scale * noise(i)), LINE.denoise)


CASES = {  # with steps enough that the error of the steps is below what the test sees
    "ddpm": (SAMPLERS["ddpm"], 200),
    "ddpm_beta": (SAMPLERS["ddpm_beta"], 100),
    "dpmpp_2m_sde": (SAMPLERS["dpmpp_2m_sde"], 60),
    "heun_churn": (partial(heun_churn, noise_scale=1.0), 50),
    "ddim, eta 0.5": (partial(ddim, eta=0.5), 100),
    "dpmpp_2m, eta 0.5": (partial(dpmpp_2m, eta=0.5), 60),
}


def test_every_stochastic_sampler_is_among_the_cases():
    assert set(STOCHASTIC) <= set(CASES)


@pytest.mark.parametrize("case", CASES)
def test_distribution(case):
    assert kolmogorov_smirnov(drawn(*CASES[case])) < CRITICAL


@pytest.mark.parametrize("case", STOCHASTIC)
@pytest.mark.parametrize("noise_scale", [0.8, 1.25])
def test_the_distribution_test_rejects_a_wrong_variance(case, noise_scale):
    assert kolmogorov_smirnov(drawn(*CASES[case], noise_scale=noise_scale)) > CRITICAL


def test_the_distribution_test_rejects_too_few_steps():
    assert kolmogorov_smirnov(drawn(SAMPLERS["ddpm"], 20)) > CRITICAL


levels = st.tuples(st.floats(0.01, 100), st.floats(0.001, 0.999)).map(lambda pair: (pair[0], pair[0] * pair[1]))


def gain(sampler, x, noise, sigma, following):
    """Where one step leads whose denoiser answers 0: a linear function of x and noise."""
    sigmas, one = torch.tensor([sigma, following], dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    return run(sampler(x * one, sigmas, lambda _: noise * one), lambda x, sigma: 0 * x).item()


@given(levels, st.floats(0, 1))
def test_noise_kept_and_added_are_noise_of_the_next_level(pair, eta):
    """For x0 = 0, x ~ N(0, sigma^2) must become N(0, s^2) exactly, however much is fresh: DDIM's freedom."""
    sigma, following = pair
    for sampler in (partial(ddim, eta=eta), partial(dpmpp_2m, eta=eta)):
        kept, added = gain(sampler, sigma, 0, sigma, following), gain(sampler, 0, 1, sigma, following)
        assert math.hypot(kept, added) == pytest.approx(following, rel=1e-9)


@given(levels)
def test_both_variances_of_the_chain(pair):
    """One mean; and beta_tilde / beta = (1 - alpha_bar_s) / (1 - alpha_bar_sigma)  [DDPM, Sec. 3.2]."""
    (sigma, following), posterior = pair, partial(ddim, eta=1.0)
    assert gain(posterior, 1, 0, sigma, following) == pytest.approx(gain(ddpm_beta, 1, 0, sigma, following))
    small, large = (gain(sampler, 0, 1, sigma, following) ** 2 for sampler in (posterior, ddpm_beta))
    shares = [level**2 / (1 + level**2) for level in (following, sigma)]  # 1 - alpha_bar
    assert small / large == pytest.approx(shares[0] / shares[1], rel=1e-6)


def test_churn_is_algorithm_2_of_edm():
    """An independent version, written as the paper's pseudocode, one number at a time."""
    churn, (low, high), noise_scale = 7.0, (0.3, 30.0), 1.05
    t = karras_sigmas(9, sigma_min=0.1, sigma_max=80.0).tolist()
    noise = np.random.default_rng(0).standard_normal((9, 5))
    x = 80 * np.random.default_rng(1).standard_normal(5)

    def d(place, level):
        return place * 0.25 / (0.25 + level**2)

    ours = heun_churn(
        torch.tensor(x)[:, None],
        torch.tensor(t, dtype=torch.float64),
        lambda i: torch.tensor(noise[i])[:, None],
        churn=churn,
        interval=(low, high),
        noise_scale=noise_scale,
    )
    result = run(ours, lambda x, sigma: x * 0.25 / (0.25 + sigma[:, None] ** 2))
    for n in range(5):
        place = x[n]
        for i in range(9):
            gamma = min(churn / 9, math.sqrt(2) - 1) if low <= t[i] <= high else 0.0
            t_hat = t[i] + gamma * t[i]
            place_hat = place + math.sqrt(t_hat**2 - t[i] ** 2) * noise_scale * noise[i, n]
            slope = (place_hat - d(place_hat, t_hat)) / t_hat
            place = place_hat + (t[i + 1] - t_hat) * slope
            if t[i + 1] != 0:
                slope_there = (place - d(place, t[i + 1])) / t[i + 1]
                place = place_hat + (t[i + 1] - t_hat) * (slope / 2 + slope_there / 2)
        assert result[n, 0].item() == pytest.approx(place, rel=1e-12)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_picture_is_the_same_bits_in_any_batch(name):
    """37 numbers a picture, so that they lie differently in vector registers alone and among others."""
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(5, 37, generator=generator) * 80, torch.randn(12, 5, 37, generator=generator)
    sigmas = karras_sigmas(12, sigma_min=0.1, sigma_max=80.0)

    def denoise(x, sigma):
        return (x * 0.25 / (0.25 + sigma[:, None] * sigma[:, None])).clamp(-1, 1)

    together = run(SAMPLERS[name](x, sigmas, lambda i: noise[i]), denoise)
    for k in range(5):
        own = noise[:, k : k + 1]
        alone = run(SAMPLERS[name](x[k : k + 1], sigmas, own.__getitem__), denoise)
        assert torch.equal(together[k : k + 1], alone)
