"""quick.py: a small evaluation of a checkpoint on the way is a function of it, is done once, and says how small it was."""

from pathlib import Path

import pytest

from diffusion.evaluation.quick import look, quick
from diffusion.evaluation.report.report import load_report
from diffusion.recipe import EvaluateRecipe, TrainRecipe
from tests.evaluated_run import make_run

WHOLE = EvaluateRecipe(
    ema=0.08, images=20_000, guide_images=20_000, sampling={"guidance_kind": "autoguidance", "steps": 7}, samples=5_000
)


def test_a_quick_look_asks_for_little_and_for_nothing_that_a_checkpoint_lacks():
    """An average that the run keeps, no other checkpoint, and else what the whole evaluation asks for."""
    small = quick(WHOLE, TrainRecipe(ema=(0.05, 0.1)))
    assert (small.samples, small.loss_pictures, small.grid_columns) == (64, 32, 4)
    assert (small.bound_steps, small.restoration_pictures) == (0, 0)
    assert (small.images, small.ema, small.guide_images, small.sampling.guidance_kind) == (
        None,
        0.1,
        None,
        "classifier_free",
    )
    assert (small.sampling.steps, small.loss_levels, small.seed) == (7, WHOLE.loss_levels, WHOLE.seed)
    smaller = EvaluateRecipe(samples=20, loss_pictures=5, grid_columns=1, bound_steps=0, restoration_pictures=0)
    assert quick(smaller, TrainRecipe()) == smaller
    assert quick(small, TrainRecipe()) == small


@pytest.fixture(scope="module")
def found(emoji_folder, tiny_recipe, tmp_path_factory):
    run = make_run(emoji_folder, tiny_recipe, tmp_path_factory.mktemp("run"))
    recipe = quick(tiny_recipe.evaluate, tiny_recipe.train)
    root = tmp_path_factory.mktemp("root")
    return run, recipe, root, look(run, recipe, root)


def content(root: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}


def test_it_is_done_once_and_anywhere_the_same(found, tmp_path):
    run, recipe, root, ref = found
    before = content(root)
    assert look(run, recipe, root) == ref
    assert content(root) == before
    elsewhere = look(run, recipe, tmp_path)
    assert (elsewhere.digest, elsewhere.metrics) == (ref.digest, ref.metrics)


def test_its_report_says_of_how_many_pictures_it_is_and_its_weights_are_not_kept(found):
    _, recipe, root, ref = found
    report = load_report(ref.uri, ref.digest)
    assert report.frechet.identity.samples == recipe.samples <= 64
    assert {f"held_out_loss_sigma_{level:g}" for level in recipe.loss_levels} <= set(ref.metrics)
    assert not list(root.rglob("weights.safetensors"))
