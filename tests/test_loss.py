from functools import partial

import pytest
import torch

from diffusion.denoiser import EDM, X0, Epsilon, V, prediction_of
from diffusion.loss import (
    Uncertainty,
    denoising_loss,
    edm_weight,
    min_snr_weight,
    p2_weight,
    simple_weight,
    uncertain,
    weight_of,
)
from diffusion.random import Stream, normal
from diffusion.recipe import TrainRecipe

SIGMA = torch.tensor([0.05, 0.5, 5.0, 50.0]).repeat_interleave(64)
INDEX = torch.arange(256)
PICTURES = 0.5 * normal(0, Stream.INITIAL, INDEX, (3, 16, 16))
NOISE = normal(0, Stream.NOISE, INDEX, (3, 16, 16))
EDM_WEIGHT = partial(edm_weight, sigma_data=0.5)
LEVELS = torch.tensor(
    [0.01, 0.2, 0.44, 0.45, 1.0, 9.0, 80.0], dtype=torch.float64
)  # SNR = 5 lies between 0.44 and 0.45
SNR = 1 / LEVELS**2


def loss(denoise, weight=EDM_WEIGHT):
    return denoising_loss(denoise, weight, PICTURES, NOISE, SIGMA, {})


def linear(x, sigma):
    return EDM(0.5).c_skip(sigma.view(-1, 1, 1, 1)) * x


def test_a_perfect_denoiser_has_no_loss():
    assert not loss(lambda x, sigma: PICTURES).any()


def test_the_best_linear_denoiser_has_loss_one_at_every_level():
    """For x0 ~ N(0, sigma_data^2) c_skip x is E[x0 given x], and the weight makes what is left 1."""
    levels = loss(linear).view(4, 64).mean(dim=1)
    torch.testing.assert_close(levels, torch.ones(4), rtol=0.02, atol=0)


def test_each_picture_has_its_own_loss():
    def wrong_in_one(x, sigma):
        out = PICTURES.clone()
        out[7] += 0.1
        return out

    values = loss(wrong_in_one)
    assert values.nonzero().flatten().tolist() == [7]
    torch.testing.assert_close(values[7], edm_weight(SIGMA[7], sigma_data=0.5) * 0.01)


def test_edm_weight_is_the_published_formula():
    torch.testing.assert_close(edm_weight(LEVELS, sigma_data=0.5), (LEVELS**2 + 0.25) / (LEVELS * 0.5) ** 2)


def test_the_simple_loss_is_the_plain_error_of_epsilon():
    """Whatever the denoiser: mean |eps - eps_predicted|^2, by its definition."""
    x = PICTURES + SIGMA.view(-1, 1, 1, 1) * NOISE
    epsilon = prediction_of(linear(x, SIGMA), x, SIGMA, Epsilon())
    expected = (epsilon - NOISE).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(loss(linear, simple_weight), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("precond", "published"),
    [
        (Epsilon(), torch.minimum(SNR, torch.tensor(5.0)) / SNR),
        (V(), torch.minimum(SNR, torch.tensor(5.0)) / (SNR + 1)),
        (X0(), torch.minimum(SNR, torch.tensor(5.0))),
    ],
    ids=["epsilon", "v", "x0"],
)
def test_min_snr_of_each_prediction_is_the_published_weight_of_its_own_error(precond, published):
    """[Hang et al. 2023, Sec. 3.4]; the network's error is the error of x0 over c_out."""
    torch.testing.assert_close(min_snr_weight(LEVELS, gamma=5.0) * precond.c_out(LEVELS) ** 2, published)


def test_min_snr_holds_low_noise_down_and_leaves_high_noise_alone():
    """The clamp the right way round: for epsilon the weight is 1 above the clamp's level and below 1 under it."""
    of_epsilon = min_snr_weight(LEVELS, gamma=5.0) * LEVELS**2
    below = LEVELS < 5**-0.5
    torch.testing.assert_close(of_epsilon[~below], torch.ones_like(of_epsilon[~below]))
    torch.testing.assert_close(of_epsilon[below], 5 * LEVELS[below] ** 2)


def test_p2_of_epsilon_is_the_published_weight():
    """[Choi et al. 2022]: L_simple's error of epsilon over (k + SNR)^gamma."""
    torch.testing.assert_close(p2_weight(LEVELS, gamma=0.5, k=2.0) * LEVELS**2, (2.0 + SNR) ** -0.5)
    torch.testing.assert_close(p2_weight(LEVELS), 1 / (1 + LEVELS**2))
    torch.testing.assert_close(p2_weight(LEVELS, gamma=0.0), simple_weight(LEVELS))


def test_a_recipe_chooses_its_weight():
    recipe = TrainRecipe(sigma_data=0.7, p2_gamma=0.3, min_snr_gamma=2.0)
    expected = {
        "edm": edm_weight(LEVELS, sigma_data=0.7),
        "simple": SNR,
        "p2": SNR / (1 + SNR) ** 0.3,
        "min_snr": SNR.clamp(max=2.0),
        "uncertainty": edm_weight(LEVELS, sigma_data=0.7),
    }
    for name, weight in expected.items():
        torch.testing.assert_close(weight_of(recipe.model_copy(update={"weight": name}))(LEVELS), weight)


def test_uncertainty_starts_without_effect():
    u = Uncertainty()(SIGMA)
    values = loss(linear)
    assert not u.any()
    assert torch.equal(uncertain(values, u), values)


def test_uncertainty_learns_the_logarithm_of_the_expected_loss():
    """Losses e(sigma) times chi-squared noise of mean 1: u = ln e, though the mean of ln loss is lower."""
    head = Uncertainty()
    optimizer = torch.optim.Adam(head.parameters(), lr=0.05)
    index = torch.arange(256)
    for step in range(200):
        sigma = (1.5 * normal(1, Stream.SIGMA, index + 256 * step)).exp()
        noise = normal(1, Stream.NOISE, index + 256 * step, (4,)).square().mean(dim=1)
        expected = sigma**0.7 / (1 + sigma)
        optimizer.zero_grad()
        uncertain(expected * noise, head(sigma)).mean().backward()
        optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * (1 - step / 200)
    sigma = torch.linspace(-2, 2, 9).exp()
    expected = sigma**0.7 / (1 + sigma)
    assert expected.log().max() - expected.log().min() > 0.8
    # E[loss] / e^u = 1: every level pulls with the same force
    torch.testing.assert_close(expected * (-head(sigma).detach()).exp(), torch.ones(9), rtol=0, atol=0.15)
