"""Restoration against what is known: the measurement is satisfied, the rest is the model's, and for Gaussians every
distribution is exact, since the denoiser is linear: the mean is the run without noise, the covariance a sum over unit
noises."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from diffusion.analytic import GaussianMixture
from diffusion.guidance import classifier_free
from diffusion.operators import BlockMean, Blur, Composition, Grey, Mask, gaussian_kernel
from diffusion.restore import Noise, Solver, ddnm_plus, null_space, residual, time_travel
from diffusion.sampler import SAMPLERS, Conversation, Query, ddim, evaluations, heun, run
from diffusion.schedule import karras_sigmas

SIGMAS = karras_sigmas(8, sigma_min=0.02, sigma_max=80.0)
SHAPE = (3, 8, 8)
EVERYTHING, NOTHING = Mask(torch.ones(SHAPE, dtype=torch.bool)), Mask(torch.zeros(SHAPE, dtype=torch.bool))


def draws(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def noise_of(seed: int, *shape: int) -> Noise:
    return lambda step: draws(1_000 * seed + step, *shape)


PICTURES = GaussianMixture(torch.tensor([0.4, 0.6]).double(), draws(0, 2, *SHAPE), torch.tensor([0.3, 0.5]).double())
HALF = Mask(draws(1, *SHAPE) > 0)
OPERATORS = {
    "mask": HALF,
    "block mean": BlockMean(4),
    "grey": Grey(),
    "small grey": Composition(BlockMean(2), Grey()),
    "blur": Blur(gaussian_kernel(1.0), 8, 8),
}


DETERMINISTIC = ("heun", "ddim", "dpmpp_2m")


def deterministic(sampler: Callable[[Tensor, Tensor], Conversation]) -> Solver:
    return lambda x, sigmas, noise: sampler(x, sigmas)


def start() -> Tensor:
    return draws(2, 2, *SHAPE) * SIGMAS[0]


# --- the measurement ---


@pytest.mark.parametrize("sampler", DETERMINISTIC)
@pytest.mark.parametrize("name", list(OPERATORS))
def test_the_result_satisfies_the_measurement(sampler: str, name: str) -> None:
    operator = OPERATORS[name]
    y = operator.forward(draws(3, 2, *SHAPE))
    conversation = null_space(SAMPLERS[sampler](start(), SIGMAS), operator, y)
    assert residual(operator, run(conversation, PICTURES.denoise), y).max() < 1e-12
    assert residual(operator, run(SAMPLERS[sampler](start(), SIGMAS), PICTURES.denoise), y).min() > 0.1


@pytest.mark.parametrize("name", list(OPERATORS))
def test_what_the_operator_does_not_see_is_the_denoisers(name: str) -> None:
    operator, x = OPERATORS[name], draws(4, 2, *SHAPE)
    y = operator.forward(draws(3, 1, *SHAPE))  # one measurement for both pictures

    def one_question() -> Conversation:
        return (yield Query(x, torch.full((2,), 2.0).double()))

    answer = run(null_space(one_question(), operator, y), PICTURES.denoise)

    def unseen(picture: Tensor) -> Tensor:
        return picture - operator.pinv(operator.forward(picture))

    torch.testing.assert_close(operator.forward(answer), y.expand(2, *y.shape[1:]))
    torch.testing.assert_close(unseen(answer), unseen(PICTURES.denoise(x, torch.full((2,), 2.0).double())))


@pytest.mark.parametrize("sampler", DETERMINISTIC)
def test_seeing_everything_gives_it_back_and_nothing_changes_nothing(sampler: str) -> None:
    x, picture = start().float(), draws(5, 2, *SHAPE).float()

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        return PICTURES.denoise(x.double(), sigma.double()).float()

    plain = run(SAMPLERS[sampler](x, SIGMAS), denoise)
    blind = run(null_space(SAMPLERS[sampler](x, SIGMAS), NOTHING, NOTHING.forward(picture)), denoise)
    seeing = run(null_space(SAMPLERS[sampler](x, SIGMAS), EVERYTHING, EVERYTHING.forward(picture)), denoise)
    assert torch.equal(blind, plain)
    torch.testing.assert_close(seeing, picture, rtol=0, atol=0 if sampler != "heun" else 1e-6)  # x - (x - D) is rounded


def test_outside_the_interval_the_sampler_is_left_alone() -> None:
    y = HALF.forward(draws(3, 2, *SHAPE))
    plain = run(ddim(start(), SIGMAS), PICTURES.denoise)
    assert torch.equal(run(null_space(ddim(start(), SIGMAS), HALF, y, (100.0, 200.0)), PICTURES.denoise), plain)
    late = run(null_space(ddim(start(), SIGMAS), HALF, y, (0.0, 1.0)), PICTURES.denoise)
    assert residual(HALF, late, y).max() < 1e-12


def test_guidance_goes_around_the_projection() -> None:
    y = HALF.forward(draws(3, 2, *SHAPE))
    centre = draws(6, 3, *SHAPE)

    def denoise(x: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
        return centre[label] + (x - centre[label]) / (1 + sigma.view(-1, 1, 1, 1) ** 2)

    cond, null = {"label": torch.tensor([0, 1])}, {"label": torch.tensor([2, 2])}
    guided = run(classifier_free(null_space(ddim(start(), SIGMAS), HALF, y), cond, null, 3.0), denoise)
    assert residual(HALF, guided, y).max() < 1e-12
    # every pixel is a world of its own here: where nothing is known, the guided sampler is as without a measurement
    plain = run(classifier_free(ddim(start(), SIGMAS), cond, null, 3.0), denoise)
    torch.testing.assert_close(guided[:, ~HALF.keep], plain[:, ~HALF.keep])
    with pytest.raises(ValueError, match="one measurement, or one for each"):
        run(null_space(classifier_free(ddim(start(), SIGMAS), cond, null, 3.0), HALF, y), denoise)


def test_residual_is_a_root_mean_square() -> None:
    x0 = torch.zeros(2, *SHAPE)
    y = BlockMean(4).forward(x0) + torch.tensor([0.5, 2.0]).view(2, 1, 1, 1)
    torch.testing.assert_close(residual(BlockMean(4), x0, y), torch.tensor([0.5, 2.0]))
    assert residual(NOTHING, x0, NOTHING.forward(x0)).tolist() == [0, 0]


# --- exact distributions ---

CORRELATION = 0.8
FIRST = Mask(torch.tensor([[[True, False]]]))  # of two correlated pixels the first is known
ONE = torch.ones(1, 1, dtype=torch.float64)


def gaussian(covariance: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """The exact denoiser of x0 ~ N(0, covariance): covariance (covariance + sigma^2 I)^-1 x."""
    one = torch.eye(len(covariance), dtype=torch.float64)
    return lambda x, sigma: (x.flatten(1) @ torch.linalg.solve(covariance + sigma[0] ** 2 * one, covariance)).view_as(x)


def moments(make: Callable[[Noise], Conversation], covariance: Tensor, draws: int) -> tuple[Tensor, Tensor]:
    """Mean and covariance of what a conversation about 1 x 1 x n pictures ends in, exactly, if it uses `draws` noises."""
    n = len(covariance)

    def unit(step: int) -> Tensor:
        z = torch.zeros(1 + n * draws, n, dtype=torch.float64)
        z[1 + n * step : 1 + n * (step + 1)] = torch.eye(n)
        return z.view(-1, 1, 1, n)

    ends = run(make(unit), gaussian(covariance)).flatten(1)
    return ends[0], (ends[1:] - ends[0]).T @ (ends[1:] - ends[0])


def two_pixels(correlation: float) -> Tensor:
    return torch.tensor([[1.0, correlation], [correlation, 1.0]], dtype=torch.float64)


def later(noise: Noise) -> Noise:
    return lambda step: noise(1 + step)


def test_independent_pixels_are_drawn_from_the_posterior() -> None:
    """There the denoiser of the hidden pixel needs nothing of the known one."""
    sigmas = karras_sigmas(400, sigma_min=0.002, sigma_max=80.0)
    mean, covariance = moments(
        lambda noise: null_space(heun(noise(0) * sigmas[0], sigmas), FIRST, ONE), two_pixels(0.0), 1
    )
    torch.testing.assert_close(mean, torch.tensor([1.0, 0.0], dtype=torch.float64))
    torch.testing.assert_close(covariance, torch.diag(torch.tensor([0.0, 1.0])).double(), rtol=0, atol=1e-3)


def hidden(make: Callable[[Noise], Conversation], draws: int) -> tuple[float, float]:
    """Mean and variance of the second pixel, correlated with the first, which is known to be 1."""
    mean, covariance = moments(make, two_pixels(CORRELATION), draws)
    assert mean[0].item() == pytest.approx(1, abs=1e-12)
    assert covariance[0].abs().max() < 1e-12
    return mean[1].item(), covariance[1, 1].item()


def test_correlated_pixels_are_drawn_too_far_from_the_known_one_and_time_travel_helps() -> None:
    """The posterior is N(0.8, 0.36).  DDNM by the equation draws N(0.34, 0.67), with ancestral noise N(0.49, 0.50): its
    denoiser sees the known pixel through noise.  Each return brings it nearer: N(0.63, 0.45) after four."""
    sigmas = karras_sigmas(50, sigma_min=0.02, sigma_max=80.0)
    posterior = CORRELATION, 1 - CORRELATION**2

    def travelled(repeats: int) -> tuple[float, float]:
        def converse(noise: Noise) -> Conversation:
            x = noise(0) * sigmas[0]
            journey = time_travel(deterministic(heun), x, sigmas, later(noise), length=5, repeats=repeats)
            return null_space(journey, FIRST, ONE)

        return hidden(converse, 1 + 10 * (6 * repeats - 1))

    found = [travelled(repeats) for repeats in (1, 2, 4)]
    off = [math.dist(moment, posterior) for moment in found]
    assert off == sorted(off, reverse=True)
    assert found[0] == pytest.approx((0.34, 0.67), abs=0.02)
    assert found[-1] == pytest.approx((0.63, 0.45), abs=0.03)
    ancestral = hidden(lambda noise: ddnm_plus(noise(0) * sigmas[0], sigmas, later(noise), FIRST, ONE, sigma_y=0.0), 51)
    assert math.dist(ancestral, posterior) < off[0]


def test_time_travel_keeps_the_distribution() -> None:
    """Up and down again is the identity in distribution: without a measurement the result stays N(0, C)."""
    sigmas = karras_sigmas(120, sigma_min=0.002, sigma_max=80.0)
    covariance = two_pixels(CORRELATION)
    mean, found = moments(
        lambda noise: time_travel(
            deterministic(heun), noise(0) * sigmas[0], sigmas, later(noise), length=20, repeats=3
        ),
        covariance,
        1 + 6 * (3 * 21 - 1),
    )
    assert mean.abs().max() == 0
    torch.testing.assert_close(found, covariance, rtol=0, atol=2e-3)


# --- noisy measurements ---


@pytest.mark.parametrize("following", [5.0, 1.0, 0.2, 0.01])
@pytest.mark.parametrize("name", list(OPERATORS))
def test_the_noise_of_a_step_is_at_its_level_in_every_direction(name: str, following: float) -> None:
    """With D = x0 and y = A x0 + sigma_y n, the noise of x after the step has the covariance s^2 I, whatever sigma_y."""
    operator, sigma, sigma_y = OPERATORS[name], 6.0, 0.3
    n = math.prod(SHAPE)
    m = operator.forward(torch.zeros(1, *SHAPE)).numel()
    before, measured, drawn = torch.eye(2 * n + m, dtype=torch.float64).split(
        [n, m, n], dim=1
    )  # all noises, one by one
    y = operator.forward(torch.zeros(len(measured), *SHAPE).double())
    y = y + sigma_y * measured.view_as(y)
    conversation = ddnm_plus(
        sigma * before.view(-1, *SHAPE),
        torch.tensor([sigma, following], dtype=torch.float64),
        lambda step: drawn.view(-1, *SHAPE),
        operator,
        y,
        sigma_y=sigma_y,
    )
    after = run(conversation, lambda x, sigma: torch.zeros_like(x)).flatten(1)
    torch.testing.assert_close(after.T @ after, following**2 * torch.eye(n).double(), rtol=1e-9, atol=1e-12)


def ancestral(x: Tensor, sigmas: Tensor, noise: Noise) -> Conversation:
    """The textbook posterior q(x_s given x_sigma, D) of the variance-exploding chain, on its own."""
    for step in range(len(sigmas) - 1):
        sigma, s = float(sigmas[step]), float(sigmas[step + 1])
        denoised = yield Query(x, torch.full((len(x),), sigma).to(x))
        variance = s**2 * (sigma**2 - s**2) / sigma**2
        x = (s / sigma) ** 2 * x + (1 - (s / sigma) ** 2) * denoised + math.sqrt(variance) * noise(step)
    return x


@pytest.mark.parametrize("name", list(OPERATORS))
def test_without_noise_it_is_ddnm(name: str) -> None:
    operator, noise = OPERATORS[name], noise_of(7, 2, *SHAPE)
    y = operator.forward(draws(3, 2, *SHAPE))
    exact = run(ddnm_plus(start(), SIGMAS, noise, operator, y, sigma_y=0.0), PICTURES.denoise)
    wrapped = run(null_space(ancestral(start(), SIGMAS, noise), operator, y), PICTURES.denoise)
    torch.testing.assert_close(exact, wrapped)


@pytest.mark.parametrize("name", list(OPERATORS))
def test_a_little_noise_is_no_reason_to_trust_less(name: str) -> None:
    """lambda is 1 as long as the sampler's own noise is larger: without drawn noise the step is DDNM's."""
    operator, levels = OPERATORS[name], torch.tensor([6.0, 5.0], dtype=torch.float64)
    y, silence = operator.forward(draws(3, 2, *SHAPE)), torch.zeros(2, *SHAPE, dtype=torch.float64)
    exact, noisy = (
        run(ddnm_plus(start(), levels, lambda step: silence, operator, y, sigma_y=sigma_y), PICTURES.denoise)
        for sigma_y in (0.0, 0.3)
    )
    torch.testing.assert_close(exact, noisy)


def test_the_denoiser_removes_the_noise_of_the_measurement() -> None:
    """16 pixels of one brightness but for 0.1, y all of them with noise 0.5: DDNM returns y, off by 0.25, DDNM+ by 0.07."""
    sigmas, n, steps, sigma_y = karras_sigmas(50, sigma_min=0.02, sigma_max=80.0), 16, 50, 0.5
    covariance = torch.ones(n, n) * 0.99 + torch.eye(n) * 0.01
    covariance = covariance.double()
    everything = Mask(torch.ones(1, 1, n, dtype=torch.bool))

    def error(assumed: float) -> float:
        """E (result - x0)^2 per pixel: the noises of x0, of y and of the sampler one by one, summed."""
        rows = torch.eye(n * (3 + steps), dtype=torch.float64).split(n, dim=1)
        x0 = rows[0] @ torch.linalg.cholesky(covariance).T

        def noise(step: int) -> Tensor:
            return rows[2 + step].view(-1, 1, 1, n)

        conversation = ddnm_plus(
            noise(0) * sigmas[0], sigmas, later(noise), everything, x0 + sigma_y * rows[1], sigma_y=assumed
        )
        return float((run(conversation, gaussian(covariance)).flatten(1) - x0).square().sum() / n)

    assert error(0.0) == pytest.approx(sigma_y**2)
    assert error(sigma_y) < error(0.0) / 3


# --- time travel ---


@pytest.mark.parametrize("sampler", DETERMINISTIC)
def test_once_is_the_solver_itself(sampler: str) -> None:
    solver = SAMPLERS[sampler]
    once = run(time_travel(deterministic(solver), start(), SIGMAS, noise_of(0), length=3, repeats=1), PICTURES.denoise)
    assert torch.equal(once, run(solver(start(), SIGMAS), PICTURES.denoise))


@pytest.mark.parametrize(("length", "repeats"), [(1, 2), (3, 3), (8, 2), (20, 4)])
def test_every_step_is_gone_that_often_and_every_noise_used_once(length: int, repeats: int) -> None:
    asked, used = [], []

    def noise(step: int) -> Tensor:
        used.append(step)
        return draws(step, 2, *SHAPE)

    def counted(x: Tensor, sigma: Tensor) -> Tensor:
        asked.append(float(sigma[0]))
        return PICTURES.denoise(x, sigma)

    y = HALF.forward(draws(3, 2, *SHAPE))

    def solver(x: Tensor, sigmas: Tensor, noise: Noise) -> Conversation:
        return ddnm_plus(x, sigmas, noise, HALF, y, sigma_y=0.0)

    end = run(time_travel(solver, start(), SIGMAS, noise, length=length, repeats=repeats), counted)
    assert len(asked) == repeats * evaluations("ddim", len(SIGMAS) - 1)
    assert all(asked.count(float(sigma)) == repeats for sigma in SIGMAS[:-1])
    assert len(used) == len(set(used))
    assert residual(HALF, end, y).max() < 1e-12


@pytest.mark.parametrize(
    ("conversation", "says"),
    [
        (lambda: null_space(ddim(start(), SIGMAS), BlockMean(2), torch.zeros(2, 3, 8, 8).double()), "give one measur"),
        (lambda: ddnm_plus(start(), SIGMAS, noise_of(0), HALF, torch.zeros(3, 99), sigma_y=0.0), "HALF|shape"),
        (
            lambda: ddnm_plus(start(), SIGMAS, noise_of(0), BlockMean(2), torch.zeros(2, 3, 4, 4), sigma_y=-1.0),
            "sigma_y",
        ),
        (lambda: time_travel(heun, start(), SIGMAS, noise_of(0), length=0, repeats=2), "length=0"),
    ],
)
def test_what_cannot_be_is_refused(conversation: Callable[[], Conversation], says: str) -> None:
    with pytest.raises((ValueError, RuntimeError), match=says):
        run(conversation(), PICTURES.denoise)
