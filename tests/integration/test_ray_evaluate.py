"""Evaluation on real Ray: the same bytes as in one process and for any number of actors; failures have their cause."""

from pathlib import Path

import pytest

from diffusion.adapters.ray_evaluate import evaluate_run
from diffusion.data import manifest
from diffusion.evaluation.measure import evaluate
from diffusion.store.refs import RunRef
from tests.evaluated_run import make_run
from tests.processes import kill, our_actors
from tests.shapes import RECIPE as SHAPED
from tests.shapes import write
from tests.words import reading

pytestmark = pytest.mark.usefixtures("ray_local")


@pytest.fixture(scope="module")
def run(emoji_folder, tiny_recipe, tmp_path_factory) -> RunRef:
    return make_run(emoji_folder, tiny_recipe, tmp_path_factory.mktemp("run"))


def content(uri: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(uri).iterdir()}


def test_any_number_of_actors_and_none_give_the_same_bytes(run, tiny_recipe, tmp_path):
    plain = evaluate(run, tiny_recipe.evaluate, tmp_path / "plain")
    for actors in (1, 3):
        seen: list[tuple[int, int]] = []
        root = tmp_path / str(actors)
        ref = evaluate_run(
            run, tiny_recipe.evaluate, root, actors=actors, progress=lambda d, t, seen=seen: seen.append((d, t))
        )
        assert ref.digest == plain.digest
        assert content(ref.uri) == content(plain.uri)
        kept = [content(str(store / "features")) for store in (root, tmp_path / "plain")]
        assert kept[0] == kept[1]
        assert len(kept[0]) == 4  # features and small copies, of training and of held-out pictures
        assert seen == sorted(seen)
        assert seen[-1][0] == seen[-1][1]


def test_captions_are_read_alike_in_every_process(emoji_folder, tiny_recipe, tmp_path):
    recipe = tiny_recipe.model_copy(update={"train": reading(tiny_recipe.train, tokens=20, width=384)})
    run = make_run(emoji_folder, recipe, tmp_path / "run")
    plain = evaluate(run, recipe.evaluate, tmp_path / "plain")
    actors = evaluate_run(run, recipe.evaluate, tmp_path / "ray", actors=2)
    assert content(actors.uri) == content(plain.uri)


def test_pictures_of_several_sizes_are_measured_alike_in_every_process(tiny_recipe, tmp_path):
    recipe = tiny_recipe.model_copy(update={"shard": SHAPED})
    run = make_run(write(tmp_path / "source"), recipe, tmp_path / "run")
    plain = evaluate(run, recipe.evaluate, tmp_path / "plain")
    actors = evaluate_run(run, recipe.evaluate, tmp_path / "ray", actors=2)
    assert content(actors.uri) == content(plain.uri)


def test_as_many_actors_as_cpus_do_not_wait_for_each_other(run, tiny_recipe, tmp_path):
    ref = evaluate_run(run, tiny_recipe.evaluate, tmp_path, actors=4)
    assert ref.metrics["frechet"] > 0


def test_an_actor_killed_in_mid_work_changes_nothing(run, tiny_recipe, tmp_path):
    plain, killed = evaluate(run, tiny_recipe.evaluate, tmp_path / "plain"), []

    def kill_one(done: int, total: int) -> None:
        if 0 < done < total and not killed:
            actor = our_actors()[0]
            assert kill(actor)
            killed.append(actor)

    ref = evaluate_run(run, tiny_recipe.evaluate, tmp_path / "ray", actors=2, progress=kill_one)
    assert killed
    assert content(ref.uri) == content(plain.uri)


def test_a_failure_has_its_cause(run, tiny_recipe, tmp_path):
    uri = run.dataset.uri
    shard = Path(manifest.root_of(uri).uri, manifest.load(uri).entries("train")[0].tar)
    data = shard.read_bytes()
    shard.write_bytes(b"x" * len(data))
    try:
        with pytest.raises(ValueError, match=rf"{shard.name} has a damaged sample") as error:
            evaluate_run(run, tiny_recipe.evaluate, tmp_path, actors=1)
    finally:
        shard.write_bytes(data)
    assert "Traceback" in "".join(error.value.__notes__)
    assert not (tmp_path / "evaluations").exists()


def test_no_actors_are_refused(run, tiny_recipe, tmp_path):
    with pytest.raises(ValueError, match="at least one"):
        evaluate_run(run, tiny_recipe.evaluate, tmp_path, actors=0)
