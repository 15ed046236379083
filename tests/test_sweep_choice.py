"""Which settings a sweep tries, gives up and chooses."""

import pytest
import torch

from diffusion.evaluation.metrics.frechet import Gaussian
from diffusion.evaluation.metrics.sample import Distance, frechet_to
from diffusion.evaluation.sweep.choice import Candidate, Difference, beaten, choice, evaluations_of, front, rounds
from diffusion.recipe import EvaluateRecipe, Recipe, SamplingRecipe, Setting, SweepRecipe, digest_of, grid, tuned
from diffusion.sampler import evaluations

DIMENSIONS = 12


def candidate(number: int, cost: int, value: float, spread: float = 0.0) -> Candidate:
    """A distance whose blocks vary by `spread`, in a pattern of its own number."""
    turns = torch.arange(32) * (number + 1) % 7 - 3.0
    left_out = tuple((value + spread * (turns - turns.mean())).tolist())
    return Candidate(number, cost, Distance(value, spread, left_out))


def drawn(shift: float, seed: int, n: int = 256, own: float = 0.3) -> Distance:
    """The distance of n samples that share their seeds with all others', all but a part of their own."""
    shared = torch.randn(n, DIMENSIONS, generator=torch.Generator().manual_seed(seed))
    apart = torch.randn(n, DIMENSIONS, generator=torch.Generator().manual_seed(seed + int(1e6 * (shift + 1))))
    features = (shared + own * apart) / (1 + own**2) ** 0.5
    reference = Gaussian(torch.zeros(DIMENSIONS).double(), torch.eye(DIMENSIONS).double())
    return frechet_to(reference, features + shift)


def test_a_recipe_without_a_sweep_keeps_its_digest():
    written = Recipe().model_dump(mode="json")
    assert "sweep" not in written
    assert digest_of(Recipe.model_validate(written)) == digest_of(Recipe())
    swept = Recipe(sweep=SweepRecipe(steps=(4, 8)))
    assert swept.sweep.on
    assert digest_of(Recipe.model_validate(swept.model_dump(mode="json"))) == digest_of(swept) != digest_of(Recipe())


def test_the_grid_is_every_combination_once_and_what_is_not_swept_is_as_it_was():
    evaluate = EvaluateRecipe()
    found = grid(SweepRecipe(steps=(8, 12, 8), guidance=(2, 2.5)), evaluate)
    assert [(s.steps, s.guidance) for s in found] == [(8, 2), (8, 2.5), (12, 2), (12, 2.5)]
    assert {(s.ema, s.sampler) for s in found} == {(evaluate.ema, evaluate.sampling.sampler)}
    changed = tuned(evaluate, Setting(ema=0.05, sampler="heun", steps=9, guidance=4.0))
    assert (changed.ema, changed.sampling) == (0.05, SamplingRecipe(sampler="heun", steps=9, guidance=4.0))
    own = Setting(ema=evaluate.ema, **evaluate.sampling.model_dump(include={"sampler", "steps", "guidance"}))
    assert tuned(evaluate, own) == evaluate


@pytest.mark.parametrize(
    ("sweep", "told"),
    [
        ({"ema": (0.3,)}, "ema: 0.3 is not above 0 and below 0.28"),
        ({"steps": (1,)}, "steps: 1 is not from 2"),
        ({"guidance": (21,)}, "guidance: 21 is not from 0 to 20"),
        ({"steps": (4,), "seed": 0}, "give another"),
        ({"steps": tuple(range(2, 260))}, "more than 256"),
    ],
)
def test_what_cannot_be_swept_is_refused(sweep, told):
    with pytest.raises(ValueError, match=told):
        Recipe.model_validate({"sweep": sweep})


def test_rounds_double_up_to_all_samples():
    assert rounds(SweepRecipe(samples=512, first_samples=128)) == (128, 256, 512)
    assert rounds(SweepRecipe(samples=300, first_samples=128)) == (128, 256, 300)
    assert rounds(SweepRecipe(samples=64, first_samples=128)) == (64,)


@pytest.mark.parametrize("sampler", ["ddim", "heun", "dpmpp_2m", "unipc", "ddpm", "heun_churn"])
def test_time_is_counted_in_what_the_network_is_asked(sampler):
    recipe = SamplingRecipe(sampler=sampler, steps=6, guidance=1)
    assert evaluations_of(recipe) == evaluations(sampler, 6)
    assert evaluations_of(recipe.model_copy(update={"guidance": 2.0})) == 2 * evaluations(sampler, 6)


def test_guidance_in_an_interval_costs_there_alone():
    recipe = SamplingRecipe(sampler="ddim", steps=6, guidance=2, guidance_interval=(0.0, 0.2))
    assert evaluations_of(recipe) == 7  # only the last level above 0, sigma_min, lies in it


def test_a_difference_is_that_of_a_jackknife_written_out():
    a, b = candidate(0, 1, 10.0, 0.2).distance, candidate(1, 1, 8.0, 0.3).distance
    found = Difference.of(a, b, 1.1)
    pseudo = torch.tensor(
        [32 * (10 - 8.8) - 31 * (x - 1.1 * y) for x, y in zip(a.left_out, b.left_out, strict=True)]
    ).double()
    assert found.value == pytest.approx(1.2)
    assert found.freed == pytest.approx(float(pseudo.mean()), abs=1e-4)
    assert found.standard_error == pytest.approx(float(pseudo.std() / 32**0.5), rel=1e-4)
    with pytest.raises(ValueError, match="not of the same samples"):
        Difference.of(a, Distance(1.0, 0.1, (1.0, 2.0)))


def test_a_difference_on_shared_seeds_is_known_better_than_its_two_distances():
    a, b = drawn(0.05, 1), drawn(0.1, 1)
    assert Difference.of(b, a).standard_error < 0.7 * (a.standard_error**2 + b.standard_error**2) ** 0.5


def test_only_what_a_faster_one_beats_beyond_doubt_is_dropped():
    slow_and_worse, fast, slow_and_better = candidate(0, 20, 12.0), candidate(1, 10, 10.0), candidate(2, 20, 9.0)
    assert beaten([slow_and_worse, fast, slow_and_better], 0.95) == {0: 2}
    assert beaten([slow_and_worse, fast], 0.95) == {0: 1}
    assert beaten([slow_and_better, fast], 0.95) == {}  # it takes longer, and is better for it
    unsure = candidate(0, 20, 12.0, spread=1.0)
    assert beaten([unsure, fast], 0.95) == {}


def test_equals_are_seldom_dropped_and_the_worse_nearly_always():
    """Of 5 settings of one distribution each is dropped in at most 5 % of rounds, all together; a shift is found."""
    wrong, right, repeats = 0, 0, 60
    for seed in range(repeats):
        equals = [Candidate(i, 10, drawn(1e-6 * (i + 1), 1_000 * seed)) for i in range(5)]
        wrong += bool(beaten(equals, 0.95))
        right += beaten([*equals[:1], Candidate(9, 10, drawn(0.3, 1_000 * seed))], 0.95) == {9: 0}
    assert wrong <= 0.05 * repeats + 3
    assert right >= 0.95 * repeats


def test_the_front_holds_what_nothing_beats():
    found = front([candidate(0, 10, 12.0), candidate(1, 20, 9.0), candidate(2, 20, 9.5), candidate(3, 40, 9.2)])
    assert found == (0, 1)


def test_the_fastest_within_tolerance_is_chosen_where_that_is_certain():
    fast, best = candidate(0, 10, 10.1), candidate(1, 40, 10.0)
    assert choice([fast, best], 0.02, 0.95) == (1, 0, True)
    assert choice([fast, best], 0.0, 0.95) == (1, 1, True)
    assert choice([candidate(0, 10, 10.1, spread=0.01), best], 0.02, 0.95) == (1, 1, True)  # it may be worse by more
    assert choice([candidate(2, 10, 10.05), fast, best], 0.02, 0.95) == (1, 2, True)  # of two as fast, the better
    noisy = [candidate(0, 10, 10.1, spread=1.0), candidate(1, 40, 10.0, spread=1.0)]
    assert choice(noisy, 0.02, 0.95) == (1, 1, False)


def test_where_the_lowest_as_measured_is_not_the_lowest_nothing_is_certain():
    """Mean distances of 1.35, 1.28 and 1.21: two are beyond tolerance of the last, and noise is larger than that."""
    lowest, certain, wrong = 0, 0, 0
    for seed in range(80):
        shifts = enumerate((0.31, 0.30, 0.29))
        found = [Candidate(i, 10 * (i + 1), drawn(shift, 7_000 * seed, own=0.6)) for i, shift in shifts]
        best, chosen, sure = choice(found, 0.05, 0.95)
        lowest, certain, wrong = lowest + (best == 2), certain + sure, wrong + (sure and chosen != 2)
    assert lowest < 70
    assert certain > 8
    assert wrong <= 3
