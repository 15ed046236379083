"""How samplers converse.  Their mathematics is in test_sampler_laws.py and test_sampler_parity.py."""

import math

import pytest
import torch

from diffusion.analytic import GaussianMixture
from diffusion.sampler import SAMPLERS, Query, ddim, dpmpp_2m, evaluations, heun, heun_churn, run
from diffusion.schedule import karras_sigmas

SIGMAS = karras_sigmas(7, sigma_min=0.002, sigma_max=80.0)


def start():
    return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 80


def noise(i):
    return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1 + i))


@pytest.mark.parametrize("name", SAMPLERS)
def test_evaluations_are_counted_right_and_all_end_at_a_point_mass(name):
    point = GaussianMixture(torch.ones(1), torch.linspace(-1, 1, 48).view(1, 3, 4, 4), torch.zeros(1))
    asked = []

    def denoise(x, sigma):
        asked.append(sigma.tolist())
        return point.denoise(x, sigma)

    out = run(SAMPLERS[name](start(), SIGMAS, noise), denoise)
    assert len(asked) == evaluations(name, 7)
    assert all(row[0] == row[1] > 0 for row in asked)
    torch.testing.assert_close(out, point.means.expand_as(out), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_step_has_its_own_noise_and_the_last_ends_clean(name):
    """Deterministic samplers ask for none, the others at most once a step, by its number; D is what the last one returns."""
    drawn = []

    def recorded(i):
        drawn.append(i)
        return noise(i)

    answers = []

    def denoise(x, sigma):
        answers.append(x / (1 + sigma.view(-1, 1, 1, 1) ** 2))
        return answers[-1]

    out = run(SAMPLERS[name](start(), SIGMAS, recorded), denoise)
    expected = {"heun_churn": [i for i in range(7) if 0.05 <= SIGMAS[i] <= 50]}.get(name, list(range(6)))
    assert drawn == (expected if SAMPLERS[name].stochastic else [])
    torch.testing.assert_close(out, answers[-1], rtol=0, atol=1e-6)


def test_the_same_noise_is_the_same_picture_and_other_noise_another():
    def draw(name, shift):
        return run(SAMPLERS[name](start(), SIGMAS, lambda i: noise(i + shift)), lambda x, sigma: x.clamp(-1, 1))

    for name, sampler in SAMPLERS.items():
        assert torch.equal(draw(name, 0), draw(name, 0))
        assert torch.equal(draw(name, 0), draw(name, 100)) != sampler.stochastic


def test_a_conversation_never_calls_a_network():
    conversation = heun(torch.ones(1, 1, 2, 2), torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64))
    query = next(conversation)
    assert isinstance(query, Query)
    assert query.sigma.dtype == torch.float32
    assert query.sigma.tolist() == [2.0]


@pytest.mark.parametrize(
    "levels", [[1.0], [1.0, 2.0, 0.0], [1.0, 1.0, 0.0], [1.0, -1.0], [math.inf, 1.0], [math.nan, 1.0]]
)
@pytest.mark.parametrize("name", SAMPLERS)
def test_levels_that_make_no_path_are_refused(name, levels):
    with pytest.raises(ValueError, match="finite noise levels, each below the one before"):
        next(SAMPLERS[name](start(), torch.tensor(levels), noise))


@pytest.mark.parametrize("name", [name for name, sampler in SAMPLERS.items() if sampler.stochastic])
def test_noise_that_is_missing_or_misshapen_is_refused(name):
    """One picture's noise would broadcast over the batch and make its pictures alike."""
    path = SIGMAS[2:]  # all but the last within the default interval of churn
    with pytest.raises(ValueError, match="give noise"):
        run(SAMPLERS[name](start(), path), lambda x, sigma: 0 * x)
    with pytest.raises(ValueError, match=r"noise\(0\) has the shape \(1, 3, 4, 4\)"):
        run(SAMPLERS[name](start(), path, lambda i: noise(i)[:1]), lambda x, sigma: 0 * x)


def test_settings_out_of_range_are_refused():
    for sampler in (ddim, dpmpp_2m):
        for eta in (-0.1, 1.1):
            with pytest.raises(ValueError, match="eta"):
                run(sampler(start(), SIGMAS, noise, eta=eta), lambda x, sigma: 0 * x)
    for setting in ({"churn": -1.0}, {"noise_scale": -1.0}):
        with pytest.raises(ValueError, match="heun"):
            next(heun_churn(start(), SIGMAS, noise, **setting))
