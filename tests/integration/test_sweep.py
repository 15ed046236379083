"""A sweep on real Ray, and in the line: killed in its midst it goes on, and what it chose is what is registered."""

import json
import re
import time
from pathlib import Path

import pytest

from diffusion.adapters.mlflow_tracking import Tracking, connect
from diffusion.adapters.ray_sweep import sweep_run
from diffusion.evaluation.sweep.report import load_sweep
from diffusion.evaluation.sweep.sweep import sweep
from diffusion.recipe import Recipe, SweepRecipe
from diffusion.store.works import remember
from flows.finished import train_key
from tests.evaluated_run import make_run
from tests.program import Place, running


@pytest.mark.usefixtures("ray_local")
def test_any_number_of_actors_and_none_find_the_same(emoji_folder, tiny_recipe, tmp_path):
    recipe = SweepRecipe(ema=tiny_recipe.train.ema, steps=(2, 3), samples=32)
    run, evaluate = make_run(emoji_folder, tiny_recipe, tmp_path / "run"), tiny_recipe.evaluate
    plain = sweep(run, recipe, evaluate, tmp_path / "plain")
    seen: list[tuple[int, int]] = []
    actors = sweep_run(run, recipe, evaluate, tmp_path / "ray", actors=3, progress=lambda *now: seen.append(now))
    for name in ("sweep.json", "sweep.md", "pareto.png"):
        assert Path(actors.uri, name).read_bytes() == Path(plain.uri, name).read_bytes()
    assert seen == sorted(seen)
    with pytest.raises(ValueError, match="at least one"):
        sweep_run(run, recipe, evaluate, tmp_path / "ray", actors=0)


def test_killed_in_its_midst_it_goes_on_and_what_it_chose_is_registered(
    place: Place, emoji_folder: Path, tiny_recipe: Recipe
) -> None:
    tried = ("--set", "sweep.steps=2,3,4,5", "--set", "sweep.guidance=1,2", "--set", "sweep.samples=64")
    line = ("--preset", "smoke", "--source", str(emoji_folder), *tried)
    store = place.home / "store"
    run = make_run(emoji_folder, tiny_recipe, store)
    remember(store, train_key(tiny_recipe.train, run.dataset), run)  # as `train` would

    def drawn() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in (store / "sweeps" / ".parts").glob("*.safetensors")}

    with running(place, "sweep", *line) as process:
        end = time.monotonic() + 240
        while len(drawn()) < 5:
            assert process.poll() is None, process.stdout.read()
            assert time.monotonic() < end
            time.sleep(0.02)
        process.kill()
        process.wait()
        before = drawn()
    assert place.wait_for_end() == []
    assert len(before) < 8 * 8, "it was at its end before it was killed"
    assert not list(store.glob("sweeps/*/sweep.json"))

    with running(place, "run", *line, "--until", "register") as process:
        said = process.communicate(timeout=300)[0]
        assert process.returncode == 0, said
    assert re.search(r"train +done before", said)
    assert before.items() <= drawn().items(), "what was drawn before is not drawn again"
    found = load_sweep(Path(re.search(r"sweep +(\S+)/sweep.md", said)[1]))
    chosen = found.tried[found.chosen].setting
    assert f"chosen     {chosen}" in said
    client = connect(Tracking(uri=f"sqlite:///{place.home}/mlflow.db", experiment="smoke"))
    version = client.get_model_version_by_alias("smoke", "champion")
    spec = json.loads((store / "bundles" / version.tags["bundle_digest"][:16] / "bundle.json").read_text())
    assert {"ema": spec["ema"]} | {name: spec["sampling"][name] for name in ("sampler", "steps", "guidance")} == (
        chosen.model_dump()
    )
    report = json.loads(next(store.glob(f"evaluations/{version.tags['report_digest'][:16]}/report.json")).read_text())
    assert report["chosen_by"] == found.digest
    experiment = client.get_experiment_by_name("smoke").experiment_id
    (logged,) = client.search_runs([experiment], "tags.stage = 'sweep'")
    assert logged.data.tags["sweep_digest"] == found.digest
    assert logged.data.metrics == found.metrics()
    names = {file.path for file in client.list_artifacts(logged.info.run_id)}
    assert {"sweep.json", "sweep.md", "pareto.png", "timing.json", "recipe.json"} <= names
    assert place.wait_for_end() == []
    assert place.strays() == []
