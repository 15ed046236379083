"""The gate over repeated rounds, on made features: noise seldom passes, and what has no business there is caught.

`tests.benchmarks.bench_gate` does the same with real pictures, and more of them.
"""

from collections import Counter

import numpy as np
import pytest
import torch

from diffusion.evaluation.gate.gate import verdict
from diffusion.recipe import GateRecipe
from tests.benchmarks import bench_gate
from tests.benchmarks.bench_gate import Kind, Pictures, divided, drawn, measured

ROUNDS, SAMPLES, DIMENSIONS = 20, 96, 12
CHAMPION = Kind(0.3)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def pictures() -> Pictures:
    """Six classes of 100, each a cloud of its own; the blurred ones lie nearer to the middle of all."""
    random = np.random.default_rng(0)
    labels = np.repeat(np.arange(6), 100)
    centres = 3 * random.standard_normal((6, DIMENSIONS))
    features = centres[labels] + random.standard_normal((600, DIMENSIONS))
    small = torch.from_numpy(random.integers(0, 256, (600, 16, 16, 3), dtype=np.uint8))
    return Pictures(torch.from_numpy(np.concatenate([features, 0.4 * features])), torch.cat([small, small]), labels)


@pytest.fixture(scope="module")
def judged(pictures) -> tuple[Counter, Counter]:
    """How often a challenger of each kind passed, and what it was refused for."""
    challengers = {
        "noise": CHAMPION,
        "better": Kind(0.1, alike=True),
        "worse": Kind(0.5, alike=True),
        "memorizes": Kind(copied=0.3),
        "drops": Kind(dropped=0.3),
    }
    passed, refused, gate = Counter(), Counter(), GateRecipe()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_gate, "TRAINING", 250)
        patch.setattr(bench_gate, "HELD_OUT", 80)
        for number in range(ROUNDS):
            at = divided(pictures, number)
            champion = measured(at, drawn(at, SAMPLES, CHAMPION, 0), "champion", DIMENSIONS)
            for seed, (name, kind) in enumerate(challengers.items(), start=1):
                challenger = measured(at, drawn(at, SAMPLES, kind, seed), name, DIMENSIONS)
                found = verdict(challenger, champion, gate)
                passed[name] += found.passed
                refused.update((name, check.name) for check in found.checks if not check.passed)
    return passed, refused


def test_noise_moves_the_alias_about_as_seldom_as_stated(judged):
    passed, _ = judged
    assert passed["noise"] <= 4  # 5 % is stated; of 20 rounds more than 4 have a probability of 0.3 %


def test_a_better_model_passes_and_a_worse_one_does_not(judged):
    passed, _ = judged
    assert passed["better"] >= 0.8 * ROUNDS
    assert passed["worse"] == 0


def test_a_model_that_repeats_its_training_pictures_is_caught_though_its_distance_is_lower(judged):
    passed, refused = judged
    assert passed["memorizes"] == 0
    assert refused["memorizes", "memorization"] >= 0.95 * ROUNDS
    assert refused["memorizes", "frechet"] < ROUNDS  # by its distance alone it would have passed


def test_a_model_that_leaves_classes_out_is_caught_by_what_it_does_not_show(judged):
    passed, refused = judged
    assert passed["drops"] == 0
    assert refused["drops", "recall"] >= ROUNDS // 2  # its distance gives it away as well
