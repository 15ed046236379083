"""Ground truth: for x0 ~ N(0, v) the denoiser is x v / (v + sigma^2) and x(sigma) is proportional to sqrt(v + sigma^2)."""

import math

import pytest
import torch

from diffusion.sampler import SAMPLERS, Query, ddim, evaluations, heun, run
from diffusion.schedule import karras_sigmas

VARIANCE = 0.25


def gaussian(x, sigma):
    return x * VARIANCE / (VARIANCE + sigma.view(-1, 1, 1, 1) ** 2)


def error(sampler, n):
    x = torch.linspace(-20, 20, 8, dtype=torch.float64).view(8, 1, 1, 1)
    sigmas = karras_sigmas(n + 1, sigma_min=0.1, sigma_max=10.0)[:-1]
    exact = x * math.sqrt((VARIANCE + 0.1**2) / (VARIANCE + 10.0**2))
    return (run(sampler(x, sigmas), gaussian) - exact).abs().max().item()


@pytest.mark.parametrize(("name", "order"), [("ddim", 1), ("heun", 2), ("dpmpp_2m", 2)])
def test_order_of_convergence(name, order):
    assert math.log2(error(SAMPLERS[name], 128) / error(SAMPLERS[name], 256)) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_evaluations_are_counted_right_and_the_end_is_clean(name):
    calls = []

    def denoise(x, sigma):
        calls.append(sigma)
        return torch.zeros_like(x)

    x, sigmas = torch.ones(2, 1, 4, 4) * 80, karras_sigmas(7, sigma_min=0.002, sigma_max=80.0)
    out = run(SAMPLERS[name](x, sigmas, lambda i: torch.ones_like(x)), denoise)
    assert len(calls) == evaluations(name, 7)
    assert out.abs().max() < 1e-6  # D = 0 everywhere: the trajectory ends there


def test_ddim_equals_diffusers():
    """On its own sigmas, diffusers' Euler scheduler is the same step."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.EulerDiscreteScheduler(prediction_type="sample", timestep_spacing="leading")
    scheduler.set_timesteps(10)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * scheduler.sigmas[0]
    ours = run(ddim(x, scheduler.sigmas), gaussian)
    theirs = x
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
        scheduler.scale_model_input(theirs, t)
        denoised = gaussian(theirs, sigma.expand(2))
        theirs = theirs + (theirs - denoised) / sigma * (scheduler.sigmas[scheduler.step_index + 1] - sigma)
        scheduler._step_index += 1
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_conversation_never_calls_a_network():
    conversation = heun(torch.ones(1, 1, 2, 2), torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64))
    query = next(conversation)
    assert isinstance(query, Query)
    assert query.sigma.dtype == torch.float32
    assert query.sigma.tolist() == [2.0]
