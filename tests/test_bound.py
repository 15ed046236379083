"""The variational bound as it is measured: unbiased by enumeration, right for a known density, whoever computes a part."""

import math

import numpy as np
import pytest
import torch

from diffusion.data.images import to_model
from diffusion.denoiser import linear
from diffusion.evaluation.facts.bound import HeldOutBound, chain_of, held_out_bound, steps_of, variances_of
from diffusion.evaluation.report.plot import bound_plot
from diffusion.evaluation.report.report import Report
from diffusion.evaluation.report.words import markdown
from diffusion.process import decoder_nll, estimated_bound, variational_bound
from diffusion.random import Stream, normal
from diffusion.recipe import EvaluateRecipe, canonical_json
from tests.test_gate import report

F64 = torch.float64
SIGMA_DATA = 0.25


class Linear(torch.nn.Module):
    """The exact denoiser of independent pixels N(0, SIGMA_DATA^2)."""

    sigma_data = SIGMA_DATA

    def forward(self, x, sigma, label):
        return linear(x, sigma, sigma_data=SIGMA_DATA)


def gaussian_pictures(n: int, side: int) -> torch.Tensor:
    noise = normal(5, Stream.NOISE, torch.arange(n), (3, side, side))
    return to_model((127.5 + 127.5 * SIGMA_DATA * noise).round().clamp(0, 255).to(torch.uint8))


def measure(recipe: EvaluateRecipe, x0: torch.Tensor, denoiser=None, *, size: int = 0) -> list[dict]:
    """All pictures, `size` at a time."""
    n = len(x0)
    return [
        held_out_bound(
            denoiser or Linear(), x0[some], {"label": torch.zeros(len(some))}, some, pictures=n, recipe=recipe
        )
        for some in torch.arange(n).split(size or n)
    ]


def facts(recipe: EvaluateRecipe, parts: list[dict]) -> HeldOutBound:
    return HeldOutBound.of(parts, recipe, "d" * 64)


def test_the_mean_over_all_draws_is_the_full_sum():
    """4 pictures with 3 steps each of a chain of 12 transitions: the random turn has 12 values, which is all there is."""
    pictures, draws = 4, 3
    recipe = EvaluateRecipe(bound_steps=13, bound_draws=draws)
    chain, numbers = chain_of(recipe), torch.arange(pictures)
    x0 = gaussian_pictures(pictures, 4).to(F64)

    def noise(t: torch.Tensor) -> torch.Tensor:
        return normal(0, Stream.BOUND, (t << 32) + numbers, (3, 4, 4)).to(F64)

    def denoise(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:  # of no special form
        return (x / (1 + sigma.view(-1, 1, 1, 1))).tanh()

    places = torch.arange(draws) * pictures + numbers[:, None]
    every = [(places + turn) % 12 + 2 for turn in range(12)]
    estimates = [estimated_bound(denoise, x0, t, noise, chain, variances_of(chain)) for t in every]
    full = variational_bound(denoise, x0, noise, chain, variances_of(chain))
    mean = torch.stack([estimate.transitions.sum(dim=1) for estimate in estimates]).mean(dim=0)
    torch.testing.assert_close(mean, full.transitions.sum(dim=1), rtol=1e-12, atol=0)
    for estimate in estimates:
        assert torch.equal(estimate.decoder, full.decoder)
        assert torch.equal(estimate.prior, full.prior)
    # and what is drawn are these, each of them
    drawn = [steps_of(recipe.model_copy(update={"seed": seed}), numbers, pictures) for seed in range(100)]
    assert all(any(torch.equal(t, one) for one in every) for t in drawn)
    assert all(any(torch.equal(t, one) for t in drawn) for one in every)


def test_a_long_chain_is_covered_evenly_by_each_picture_and_by_all_together():
    recipe = EvaluateRecipe(bound_steps=100_000, bound_draws=5)
    t = steps_of(recipe, torch.arange(7), 7)
    for width, some in ((99_999 / 35, t.flatten()), *((99_999 / 5, row) for row in t)):
        gaps = some.sort().values.diff()
        assert gaps.max() <= 2 * width
        assert gaps.min() >= 0
    cells = ((t.flatten() - 2) * 35 // 99_999).sort().values
    assert cells.tolist() == list(range(35))


def test_a_gaussians_bound_is_its_likelihood():
    """Its KL terms are known one by one: E||x0 - D||^2 = s^2 sigma^2 / (s^2 + sigma^2) a value.  The bound exceeds the
    likelihood by what a chain of 1000 steps costs, the upper sum of those terms over their integral: 0.02 bits here."""
    recipe = EvaluateRecipe(bound_draws=64)
    x0, levels = gaussian_pictures(16, 32), chain_of(recipe).sigmas
    found = facts(recipe, measure(recipe, x0))
    before, now = levels[:-1] ** 2, levels[1:] ** 2
    errors = SIGMA_DATA**2 * now / (SIGMA_DATA**2 + now)
    bits = ((1 / before - 1 / now) / 2 * errors / math.log(2)).sum().item()
    assert found.transitions == pytest.approx(bits, abs=0.01)
    integral = math.log2((1 + (SIGMA_DATA / 0.02) ** 2) / (1 + (SIGMA_DATA / 80) ** 2)) / 2
    exact = (decoder_nll(torch.zeros_like(x0), x0, SIGMA_DATA**2) / (3 * 32 * 32 * math.log(2))).mean().item()
    assert exact == pytest.approx(math.log2(127.5 * SIGMA_DATA * math.sqrt(2 * math.pi * math.e)), abs=0.02)
    assert found.value - exact == pytest.approx(bits - integral, abs=0.015)
    assert found.value > exact
    assert found.low < found.value < found.high
    assert found.value == found.zero  # the network that answers 0 is this model
    assert found.value == pytest.approx(found.prior + found.transitions + found.decoder, abs=2e-5)
    assert found.transitions == pytest.approx(sum(part.bits for part in found.profile), abs=1e-4)
    assert (found.profile[0].sigma_from, found.profile[-1].sigma_to) == (0.02, 80)
    # below sigma_data each octave of noise hides a bit, above it none is left
    first, last = found.profile[0], found.profile[-1]
    assert first.bits == pytest.approx(math.log2(first.sigma_to / first.sigma_from), rel=0.03)
    assert last.bits < 1e-3


def test_a_worse_network_has_a_worse_bound():
    class Off(Linear):
        def forward(self, x, sigma, label):
            return super().forward(x, sigma, label) + 0.05

    recipe, x0 = EvaluateRecipe(), gaussian_pictures(8, 8)
    good, bad = facts(recipe, measure(recipe, x0)), facts(recipe, measure(recipe, x0, Off()))
    assert bad.value > good.value + 1
    assert bad.zero == good.zero
    assert bad.prior == good.prior


@pytest.mark.parametrize("size", [1, 3, 8])
def test_a_pictures_numbers_do_not_depend_on_who_computes_it(size):
    recipe, x0 = EvaluateRecipe(bound_draws=3), gaussian_pictures(8, 8)
    together, apart = facts(recipe, measure(recipe, x0)), facts(recipe, measure(recipe, x0, size=size))
    assert together == apart
    other = recipe.model_copy(update={"seed": 1})
    assert facts(other, measure(other, x0)).value != together.value


def test_a_diverged_network_has_no_bound():
    class Diverged(Linear):
        def forward(self, x, sigma, label):
            return torch.full_like(x, torch.nan)

    recipe = EvaluateRecipe(bound_draws=2)
    found = facts(recipe, measure(recipe, gaussian_pictures(2, 8), Diverged()))
    assert (found.value, found.transitions, found.decoder, found.low) == (None, None, None, None)
    assert found.zero > 0
    one = facts(recipe, measure(recipe, gaussian_pictures(1, 8)))
    assert (one.standard_error, one.low, one.high) == (None, None, None)
    assert one.value > 0
    page = markdown(report().model_copy(update={"bound": one}))
    assert f"| **this model** | **{one.value:.4g}** | no interval of a single one; 1 held-out picture |" in page
    page = markdown(report().model_copy(update={"bound": found}))
    assert "| **this model** | **not finite** | no interval; 2 held-out pictures |" in page


def test_the_plot_has_a_bar_for_each_part():
    recipe, x0 = EvaluateRecipe(bound_draws=8), gaussian_pictures(4, 8)
    found = facts(recipe, measure(recipe, x0))

    def heights(bound: HeldOutBound) -> list[int]:
        image = bound_plot(bound).astype(int)[44:310]
        middles = 70 + 550 / 9 * (np.arange(9) + 0.5)
        return [int((abs(image[:, int(x), 0] - image[:, int(x), 2]) > 100).sum()) for x in middles]

    bars = np.array([found.decoder, *(part.bits for part in found.profile)])
    assert np.abs(np.array(heights(found)) - 266 * bars / bars.max()).max() <= 2
    silent = found.model_copy(update={"decoder": None})
    assert heights(silent)[0] == 0
    nothing = tuple(part.model_copy(update={"bits": None}) for part in found.profile)
    assert max(heights(silent.model_copy(update={"profile": nothing}))) < 10  # the words that say so


def test_reports_hold_it_and_those_of_before_read_as_they_are():
    recipe, x0 = EvaluateRecipe(bound_draws=2), gaussian_pictures(4, 8)
    before = report()
    assert b'"bound"' not in canonical_json(before)
    assert Report.model_validate_json(canonical_json(before)) == before
    made = before.model_copy(update={"bound": facts(recipe, measure(recipe, x0))})
    assert Report.model_validate_json(canonical_json(made)) == made
    assert made.digest != before.digest
    text, value = markdown(made), made.bound.value
    assert f"**{value:.4g}**" in text
    assert "(bound.png)" in text
    identity = text.split("## Identity of the numbers")[1]
    assert all(name in identity and str(value) in identity for name, value in made.bound.identity.model_dump().items())
    assert "Not measured: evaluate.bound_steps is 0" in markdown(before)
    names = {"bound_bits", "bound_bits_standard_error", "bound_bits_low", "bound_bits_high"}
    assert made.metrics().keys() - before.metrics().keys() == names
    assert all(np.isfinite(value) for value in made.metrics().values())
