"""Editing against closed forms: for x0 ~ N(0, v) the equation carries x in proportion to sqrt(v + sigma^2)."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from diffusion.analytic import GaussianMixture
from diffusion.edit import by_condition, invert, levels_of, low_pass, sdedit
from diffusion.guidance import classifier_free, conditioned
from diffusion.operators import BlockMean, Mask
from diffusion.restore import null_space
from diffusion.sampler import Conversation, ddim, dpmpp_2m, heun, run
from diffusion.schedule import karras_sigmas

SIGMAS = karras_sigmas(10, sigma_min=0.02, sigma_max=80.0)
SHAPE = (3, 8, 8)
VARIANCE = 0.25
LABELS = {"label": torch.tensor([0, 1])}
OTHERS = {"label": torch.tensor([1, 0])}
NULL = {"label": torch.tensor([2, 2])}


def draws(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


REFERENCE, NOISE = draws(0, 2, *SHAPE), draws(1, 2, *SHAPE)
MIXTURE = GaussianMixture(torch.tensor([0.3, 0.7]).double(), draws(2, 2, *SHAPE), torch.tensor([0.3, 0.6]).double())
PLACES = draws(3, 3, *SHAPE)


def gaussian(x: Tensor, sigma: Tensor) -> Tensor:
    return x * VARIANCE / (VARIANCE + sigma.view(-1, 1, 1, 1) ** 2)


def by_label(x: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
    """Each class is N(place, 0.5^2 I)."""
    return PLACES[label] + gaussian(x - PLACES[label], sigma)


# --- strength ---


@pytest.mark.parametrize(("strength", "steps"), [(1.0, 10), (0.6, 6), (0.55, 6), (0.1, 1), (1e-9, 1)])
def test_strength_is_a_share_of_the_steps(strength: float, steps: int) -> None:
    assert torch.equal(levels_of(SIGMAS, strength), SIGMAS[10 - steps :])


@pytest.mark.parametrize("strength", [0.0, 1.01, -0.5, math.nan])
def test_other_strengths_are_refused(strength: float) -> None:
    with pytest.raises(ValueError, match="strength="):
        levels_of(SIGMAS, strength)


@pytest.mark.parametrize("solver", [ddim, heun, dpmpp_2m])
def test_strength_one_is_generation_bit_for_bit(solver: Callable[[Tensor, Tensor], Conversation]) -> None:
    noise = NOISE.float()
    edited = run(sdedit(solver, REFERENCE.float(), noise, SIGMAS, strength=1.0), gaussian)
    assert torch.equal(edited, run(solver(noise * SIGMAS[0].float(), SIGMAS), gaussian))


@pytest.mark.parametrize("strength", [0.2, 0.5, 0.8])
def test_sdedit_of_a_gaussian_is_known(strength: float) -> None:
    """(reference + s n) sqrt(v / (v + s^2)): the weaker, the nearer to the reference."""
    sigmas = karras_sigmas(200, sigma_min=1e-3, sigma_max=80.0)
    start = levels_of(sigmas, strength)[0]
    edited = run(sdedit(heun, REFERENCE, NOISE, sigmas, strength=strength), gaussian)
    exact = (REFERENCE + start * NOISE) * (VARIANCE / (VARIANCE + start**2)).sqrt()
    torch.testing.assert_close(edited, exact, rtol=0, atol=5e-3)


# --- inversion ---


@pytest.mark.parametrize(("solver", "order"), [(ddim, 1), (heun, 2), (dpmpp_2m, 2)])
def test_inversion_converges_with_the_order_of_its_solver(solver, order: int) -> None:
    exact = REFERENCE * math.sqrt((VARIANCE + 10.0**2) / (VARIANCE + 0.1**2))

    def error(n: int) -> float:
        sigmas = karras_sigmas(n, sigma_min=0.1, sigma_max=10.0)
        return (run(invert(solver, REFERENCE, sigmas), gaussian) - exact).abs().max().item()

    assert math.log2(error(400) / error(800)) == pytest.approx(order, abs=0.15)


def test_with_ddim_it_is_ddim_inversion() -> None:
    x = REFERENCE
    for sigma, following in zip(SIGMAS[:-1].flip(0)[:-1], SIGMAS[:-1].flip(0)[1:], strict=True):
        x = x + (following - sigma) * (x - MIXTURE.denoise(x, sigma.expand(2))) / sigma
    torch.testing.assert_close(run(invert(ddim, REFERENCE, SIGMAS), MIXTURE.denoise), x)


@pytest.mark.parametrize(("solver", "order"), [(ddim, 1), (heun, 2), (dpmpp_2m, 2)])
def test_there_and_back_returns_the_reference_with_that_order(solver, order: int) -> None:
    under = lambda conversation: conditioned(conversation, LABELS)  # noqa: E731

    def error(n: int) -> float:
        sigmas = karras_sigmas(n, sigma_min=1e-4, sigma_max=10.0)
        back = run(by_condition(solver, REFERENCE, sigmas, before=under, after=under), by_label)
        return (back - REFERENCE).abs().max().item()

    assert error(256) < 0.1
    assert math.log2(error(128) / error(256)) > order - 0.15


def test_of_one_level_there_is_no_way_up() -> None:
    asked = []

    def under(conversation):
        asked.append(conversation)
        return conversation

    sigmas = SIGMAS[[0, -1]]
    drawn = run(by_condition(heun, REFERENCE, sigmas, before=under, after=lambda conversation: conversation), gaussian)
    torch.testing.assert_close(drawn, gaussian(REFERENCE, sigmas[:1].expand(len(REFERENCE))))
    assert asked == []


def test_what_the_last_level_takes_for_noise_is_lost() -> None:
    """However many steps: the way ends in D, which shrinks the reference by sigma_min^2 / (v + sigma_min^2)."""
    sigmas = karras_sigmas(400, sigma_min=0.1, sigma_max=10.0)
    back = run(by_condition(heun, REFERENCE, sigmas, before=lambda c: c, after=lambda c: c), gaussian)
    torch.testing.assert_close(back, REFERENCE * VARIANCE / (VARIANCE + 0.1**2), rtol=1e-3, atol=1e-3)


def test_another_condition_on_the_way_down_leads_elsewhere() -> None:
    """Between N(place, v I) of two labels the equation shifts by the places' difference, but for what sigma_max keeps."""
    sigmas = karras_sigmas(400, sigma_min=1e-3, sigma_max=80.0)
    before, after = (lambda c, cond=cond: conditioned(c, cond) for cond in (LABELS, OTHERS))
    edited = run(by_condition(heun, REFERENCE, sigmas, before=before, after=after), by_label)
    share = 1 - math.sqrt(VARIANCE / (VARIANCE + 80.0**2))
    expected = REFERENCE + share * (PLACES[OTHERS["label"]] - PLACES[LABELS["label"]])
    torch.testing.assert_close(edited, expected, rtol=0, atol=2e-3)


def test_outside_the_mask_the_reference_stays() -> None:
    keep = Mask(draws(4, *SHAPE) > 0)

    def after(conversation: Conversation) -> Conversation:
        masked = null_space(conversation, keep, keep.forward(REFERENCE))
        return classifier_free(masked, OTHERS, NULL, 3.0)

    edited = run(
        by_condition(dpmpp_2m, REFERENCE, SIGMAS, before=lambda c: conditioned(c, LABELS), after=after), by_label
    )
    assert torch.equal(edited[:, keep.keep], REFERENCE[:, keep.keep])
    assert (edited - REFERENCE)[:, ~keep.keep].abs().mean() > 0.5


# --- low-pass guidance ---


def test_the_means_of_blocks_stay_the_references() -> None:
    start = NOISE * SIGMAS[0]
    blocks = BlockMean(4)
    edited = run(low_pass(dpmpp_2m(start, SIGMAS), REFERENCE, factor=4, until=0.0), MIXTURE.denoise)
    torch.testing.assert_close(blocks.forward(edited), blocks.forward(REFERENCE))
    free = run(dpmpp_2m(start, SIGMAS), MIXTURE.denoise)
    near = run(low_pass(dpmpp_2m(start, SIGMAS), REFERENCE, factor=4, until=1.0), MIXTURE.denoise)
    off = [(blocks.forward(x) - blocks.forward(REFERENCE)).norm() for x in (edited, near, free)]
    assert off == sorted(off)
    assert torch.equal(free, run(low_pass(dpmpp_2m(start, SIGMAS), REFERENCE, factor=4, until=81.0), MIXTURE.denoise))
