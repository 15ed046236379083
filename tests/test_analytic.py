"""The closed forms against numerical integration and sampling: what everything else is judged by."""

import pytest
import torch

from diffusion.analytic import GaussianMixture
from diffusion.random import Stream, normal, uniform

MIXTURE = GaussianMixture(
    weights=torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64),
    means=torch.tensor([[-1.0], [0.3], [1.2]], dtype=torch.float64),
    stds=torch.tensor([0.1, 0.4, 0.0], dtype=torch.float64),
)
X = torch.linspace(-3, 3, 25, dtype=torch.float64)[:, None]


def sigmas(value: float) -> torch.Tensor:
    return torch.full((len(X),), value, dtype=torch.float64)


@pytest.mark.parametrize("sigma", [0.2, 1.0, 5.0])
def test_the_density_integrates_to_one(sigma):
    grid = torch.linspace(-60, 60, 200_001, dtype=torch.float64)
    density = MIXTURE.log_density(grid[:, None], torch.full_like(grid, sigma)).exp()
    assert torch.trapezoid(density, grid).item() == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("sigma", [0.2, 1.0, 5.0])
def test_the_score_is_the_gradient_of_the_log_density(sigma):
    x = X.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(MIXTURE.log_density(x, sigmas(sigma)).sum(), x)
    torch.testing.assert_close(MIXTURE.score(X, sigmas(sigma)), gradient)


def test_the_denoiser_is_the_posterior_mean():
    """E[x0 given x] by integration over x0, for the mixture's continuous part."""
    mixture = GaussianMixture(MIXTURE.weights[:2] / 0.7, MIXTURE.means[:2], MIXTURE.stds[:2])
    x0 = torch.linspace(-8, 8, 40_001, dtype=torch.float64)
    prior = mixture.log_density(x0[:, None], torch.zeros_like(x0)).exp()
    likelihood = torch.exp(-((X - x0) ** 2) / (2 * 0.5**2))
    expected = torch.trapezoid(prior * likelihood * x0, x0) / torch.trapezoid(prior * likelihood, x0)
    torch.testing.assert_close(mixture.denoise(X, sigmas(0.5))[:, 0], expected, rtol=1e-8, atol=1e-8)


def test_samples_have_the_mixtures_moments():
    index = torch.arange(200_000)
    x0 = MIXTURE.sample(uniform(0, Stream.LABEL_DROP, index).double(), normal(0, Stream.NOISE, index, (1,)).double())
    mean = (MIXTURE.weights[:, None] * MIXTURE.means).sum()
    second = (MIXTURE.weights * (MIXTURE.stds**2 + MIXTURE.means[:, 0] ** 2)).sum()
    assert x0.mean().item() == pytest.approx(mean.item(), abs=0.01)
    assert x0.square().mean().item() == pytest.approx(second.item(), abs=0.02)


def test_pictures_have_the_shape_of_pictures():
    mixture = GaussianMixture(torch.tensor([1.0]), torch.zeros(1, 3, 4, 4), torch.tensor([0.5]))
    x, sigma = torch.randn(2, 3, 4, 4), torch.tensor([0.5, 2.0])
    expected = x * (0.25 / (0.25 + sigma**2)).view(2, 1, 1, 1)
    torch.testing.assert_close(mixture.denoise(x, sigma), expected)
