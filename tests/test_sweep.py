"""A sweep in one process, on a real run: what it finds, what it draws, what it does not do again."""

import re
from pathlib import Path

import pytest
from PIL import Image

from diffusion.evaluation.measure import evaluate
from diffusion.evaluation.sweep.report import load_seconds, load_sweep, table
from diffusion.evaluation.sweep.sweep import in_process, sweep
from diffusion.lineage.looks_at_store import looks_at_store
from diffusion.lineage.verify import verify
from diffusion.recipe import Setting, SweepRecipe, checkpoints_of, tuned
from diffusion.store.averages import moments_read
from diffusion.store.works import remember
from flows.finished import sweep_key
from flows.finished import swept as chosen_of
from flows.preflight import check_drawing, check_sweep
from flows.recipes import merged
from flows.site import Site
from flows.summary import tried
from tests.evaluated_run import make_run

SWEEP = SweepRecipe(steps=(2, 3, 6), guidance=(1, 2.5), samples=64, first_samples=32)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def run(emoji_folder, tiny_recipe, root):
    return make_run(emoji_folder, tiny_recipe, root)


class Watch:
    """Workers in this process whose tasks are counted, and which may be ended before all is done."""

    def __init__(self, end_after: int | None = None) -> None:
        self.tasks, self.end_after = [], end_after

    def __call__(self, setups, tasks):
        for task, result in zip(tasks, in_process(setups, tasks), strict=True):
            if len(self.tasks) == self.end_after:
                raise KeyboardInterrupt
            self.tasks.append(task)
            yield result

    def drawn(self) -> dict[Setting, int]:
        counts: dict[Setting, int] = {}
        for task in self.tasks:
            if task.setting:
                counts[task.setting] = counts.get(task.setting, 0) + len(task.draws)
        return counts


@pytest.fixture(scope="module")
def swept(run, tiny_recipe, root):
    watch, seen = Watch(), []
    ref = sweep(run, SWEEP, tiny_recipe.evaluate, root, each=watch, progress=lambda *now: seen.append(now))
    return ref, watch, seen


def test_what_is_measured_is_what_an_evaluation_of_that_setting_measures(swept, run, tiny_recipe, tmp_path):
    found = load_sweep(swept[0].uri, swept[0].digest)
    one = found.tried[found.chosen]
    recipe = tuned(tiny_recipe.evaluate, one.setting).model_copy(update={"samples": one.samples, "seed": SWEEP.seed})
    measured = evaluate(run, recipe, tmp_path).metrics
    assert (one.value, one.standard_error) == (measured["frechet"], measured["frechet_standard_error"])
    assert (one.low, one.high) == (measured["frechet_low"], measured["frechet_high"])


def test_every_setting_is_told_of_and_the_dropped_are_drawn_no_further(swept):
    ref, watch, seen = swept
    found = load_sweep(ref.uri, ref.digest)
    assert len(found.tried) == 6
    assert {one.setting: one.samples for one in found.tried} == watch.drawn()
    assert {one.evaluations for one in found.tried} == {2, 3, 6, 4, 12}
    for one in found.tried:
        if one.samples < 64:
            assert found.tried[one.dropped_for].evaluations <= one.evaluations
    assert found.tried[found.chosen].dropped_for is None
    assert ref.chosen == found.tried[found.chosen].setting
    assert found.best in found.front
    assert seen == sorted(seen)
    assert seen[-1] == (6 * 64, 6 * 64)


def test_it_is_shown_to_people(swept):
    ref, *_ = swept
    text = Path(ref.uri, "sweep.md").read_text()
    assert f"**Chosen: {ref.chosen}.**" in text
    assert text.count("\n| ") > 12
    for row in ("metric | frechet/1", "labels | in the frequencies of the data", "batch_size (drawn at once) | 8"):
        assert f"\n| {row} |\n" in text
    assert Image.open(Path(ref.uri, "pareto.png")).size == (640, 360)
    seconds = load_seconds(ref.uri)
    assert all(value > 0 for value in seconds)
    assert len(table(load_sweep(ref.uri), seconds)[0]) == len(table(load_sweep(ref.uri))[0]) + 1
    assert not list(Path(ref.uri).parent.glob(".work-*/bundles/*"))


def test_what_is_kept_to_go_on_from_is_nothing_to_verify(swept, root):
    looks = list(looks_at_store(root))
    assert [look.place for look in looks if "/sweeps/" in look.place] == [f"{swept[0].uri}/sweep.json"]
    assert verify(looks, progress=lambda done, total: None) == []


def test_it_is_said_with_the_way_to_have_it_without_a_sweep(swept, capsys):
    ref, *_ = swept
    tried(ref, alone=True)
    said = capsys.readouterr().out
    assert len(re.findall(r"dpmpp_2m +\d", said)) == 6
    assert f"chosen     {ref.chosen}" in said
    words = iter(ref.chosen.options.split())
    settings = [next(words) for word in words if word == "--set"]
    recipe = merged("smoke", settings=settings)
    assert recipe.evaluate == tuned(merged("smoke").evaluate, ref.chosen)
    assert ref.chosen.options in said


def test_later_stages_use_what_was_chosen_and_ask_for_the_sweep_where_there_is_none(swept, run, tiny_recipe, tmp_path):
    site, recipe = Site(home=tmp_path), tiny_recipe.model_copy(update={"sweep": SWEEP})
    assert chosen_of(tiny_recipe, run, site) == tiny_recipe
    with pytest.raises(ValueError, match=r"not tried on this run yet: run `diffusion sweep` with the same options"):
        chosen_of(recipe, run, site)
    remember(site.store, sweep_key(SWEEP, recipe.evaluate, run), swept[0])
    assert chosen_of(recipe, run, site).evaluate == tuned(recipe.evaluate, swept[0].chosen, swept[0].digest)
    other = recipe.evaluate.model_copy(update={"loss_pictures": 3, "samples": 99})
    assert sweep_key(SWEEP, other, run) == sweep_key(SWEEP, recipe.evaluate, run), "of what it does not depend on"


def test_checkpoints_stay_that_a_width_to_try_is_put_together_from(tiny_recipe):
    evaluate, train = tiny_recipe.evaluate, tiny_recipe.train
    assert moments_read(evaluate, train) == checkpoints_of(train)[-1:]
    assert moments_read(evaluate, train, (0.12,)) == checkpoints_of(train)


def test_a_sweep_of_nothing_and_one_that_cannot_be_are_refused_before_anything_starts(tiny_recipe):
    with pytest.raises(ValueError, match=r"--set sweep\.steps=8,12,24"):
        check_sweep(tiny_recipe)
    recipe = tiny_recipe.model_copy(update={"sweep": SweepRecipe(ema=(0.001,))})
    with pytest.raises(ValueError, match="cannot be put together"):
        check_sweep(recipe)
    spaced = tiny_recipe.evaluate.sampling.model_copy(update={"spacing": "trailing", "chain_steps": 8})
    evaluate = tiny_recipe.evaluate.model_copy(update={"sampling": spaced})
    with pytest.raises(ValueError, match="steps=12"):
        check_drawing(tiny_recipe.model_copy(update={"evaluate": evaluate, "sweep": SweepRecipe(steps=(4, 12))}))


def test_interrupted_it_goes_on_where_it_was_and_ends_the_same(swept, run, tiny_recipe, root, tmp_path):
    first, second = Watch(end_after=15), Watch()
    with pytest.raises(KeyboardInterrupt):
        sweep(run, SWEEP, tiny_recipe.evaluate, tmp_path, each=first)
    again = sweep(run, SWEEP, tiny_recipe.evaluate, tmp_path, each=second)
    assert again.digest == swept[0].digest
    total = {setting: n + second.drawn().get(setting, 0) for setting, n in first.drawn().items()}
    assert total == {k: v for k, v in swept[1].drawn().items() if k in total}
    assert second.drawn() != swept[1].drawn()


def test_a_wider_grid_draws_what_is_new_alone_and_a_damaged_part_again(run, tiny_recipe, swept, root):
    parts = sorted((root / "sweeps" / ".parts").iterdir())
    data = bytearray(parts[0].read_bytes())
    data[-1] ^= 1
    parts[0].write_bytes(data)
    watch = Watch()
    sweep(run, SWEEP.model_copy(update={"steps": (2, 3, 6, 4)}), tiny_recipe.evaluate, root, each=watch)
    again = {setting: n for setting, n in watch.drawn().items() if setting.steps != 4}
    assert list(again.values()) == [tiny_recipe.evaluate.batch_size]  # the damaged one
    assert len(watch.drawn()) == 3  # and the two new ones


def test_a_model_without_pictures_is_refused_in_words(emoji_folder, tiny_recipe, tmp_path):
    poisoned = make_run(emoji_folder, tiny_recipe, tmp_path, poison=True)
    with pytest.raises(ValueError, match="no setting of the sweep gives pictures"):
        sweep(poisoned, SWEEP, tiny_recipe.evaluate, tmp_path)


def test_averages_that_the_run_did_not_keep_are_put_together(run, tiny_recipe, tmp_path):
    widths = SweepRecipe(ema=(*tiny_recipe.train.ema, 0.12), steps=(2,), samples=32)
    found = load_sweep(sweep(run, widths, tiny_recipe.evaluate, tmp_path).uri)
    assert len({one.value for one in found.tried}) == len(found.tried) == len(widths.ema)


def test_a_damaged_sweep_is_refused(swept, tmp_path):
    (tmp_path / "sweep.json").write_text("{}")
    with pytest.raises(ValueError, match="damaged"):
        load_sweep(tmp_path, swept[0].digest)
    with pytest.raises(ValueError, match="diffusion sweep"):
        load_sweep(tmp_path / "none")
