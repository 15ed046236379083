"""adapters/ray_validate.py on a real Ray: checkpoints are measured beside a run, once, and failures are told and left."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest
import ray
from ray.exceptions import RayError

from diffusion.adapters.ray_validate import Validation, reason_of
from diffusion.evaluation.quick import look, named, quick
from diffusion.recipe import Recipe, digest_of
from diffusion.store.refs import EvaluationRef, RunRef
from diffusion.training.journal import judged_in
from tests.evaluated_run import make_run

pytestmark = pytest.mark.usefixtures("ray_local")


@pytest.fixture(scope="module")
def recipe(tiny_recipe: Recipe) -> Recipe:
    """A run that is longer than what was made of it: its checkpoints are on the way."""
    train = tiny_recipe.train.model_copy(update={"checkpoint_images": tiny_recipe.train.batch_size})
    return tiny_recipe.model_copy(update={"train": train})


@pytest.fixture(scope="module")
def run(emoji_folder: Path, recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> RunRef:
    made = make_run(emoji_folder, recipe, root := tmp_path_factory.mktemp("run"))
    shutil.move(Path(made.uri).parent, root / "checkpoints")
    return made.model_copy(update={"uri": str(root / "checkpoints" / Path(made.uri).name)})


class Driver:
    """As a driver that was started, hears of what happens, and may be started again."""

    def __init__(self, run: RunRef, recipe: Recipe) -> None:
        self.folder = Path(run.uri).parent.parent
        self.results: list[EvaluationRef] = []
        self.events: list[dict] = []
        self.validation = Validation(
            self.folder,
            recipe.train,
            run.dataset,
            quick(recipe.evaluate, recipe.train),
            on_result=self.results.append,
            on_event=self.events.append,
        )

    def wait_for(self, n: int) -> None:
        end = time.monotonic() + 300
        while len(self.results) + len(self.events) < n and time.monotonic() < end:
            time.sleep(0.05)
            self.validation.turn()

    def journal(self) -> list[dict]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]


def test_checkpoints_are_measured_beside_the_run_and_after_a_restart_none_twice(run: RunRef, recipe: Recipe):
    first, last = recipe.train.batch_size, run.images_seen
    driver = Driver(run, recipe)
    driver.validation.hear({"event": "resumed", "images_seen": last})
    driver.validation.hear({"event": "checkpoint", "images_seen": last, "uri": run.uri, "digest": run.digest})
    assert (driver.results, driver.validation._running is not None) == ([], True), "the driver is not kept waiting"
    driver.wait_for(2)
    assert [found.run.images_seen for found in driver.results] == [last, first], "the newest first"
    assert driver.events == []
    here = look(run, quick(recipe.evaluate, recipe.train), driver.folder / "here")
    assert driver.results[0].digest == here.digest, "as in this process"
    told = driver.journal()
    assert [(line["event"], line["images_seen"]) for line in told] == [
        ("validating", last), ("validated", last), ("validating", first), ("validated", first)
    ]  # fmt: skip
    assert named(here).items() <= told[1].items()
    kind, scores = judged_in(driver.folder / "metrics.jsonl").scores.popitem()
    assert kind == digest_of(quick(recipe.evaluate, recipe.train))
    assert scores == {found.run.images_seen: found.metrics["frechet"] for found in driver.results}

    again = Driver(run, recipe)
    again.validation.hear({"event": "resumed", "images_seen": last})
    assert again.validation._running is None, "all was told of"

    (driver.folder / "metrics.jsonl").unlink()  # as where the driver died before it could tell
    reports = {path: path.stat().st_mtime_ns for path in (driver.folder / "validation").rglob("*")}
    again = Driver(run, recipe)
    again.validation.hear({"event": "resumed", "images_seen": last})
    again.wait_for(2)
    assert again.results == driver.results
    assert reports == {path: path.stat().st_mtime_ns for path in (driver.folder / "validation").rglob("*")}


def test_what_goes_wrong_is_told_and_left(run: RunRef, recipe: Recipe, tmp_path: Path):
    folder = tmp_path / "checkpoints" / Path(run.uri).name
    shutil.copytree(run.uri, folder)
    for average in folder.glob("ema-*"):
        average.write_bytes(b"not what the manifest says")
    folder.with_name(f"{1:012d}").mkdir()  # one that goes in this moment
    driver = Driver(run.model_copy(update={"uri": str(folder)}), recipe)
    driver.validation.hear({"event": "resumed", "images_seen": run.images_seen})
    driver.wait_for(1)
    assert [event["event"] for event in driver.events] == ["validation_failed"]
    assert "sha256" in driver.events[0]["reason"]
    assert driver.journal()[-1]["event"] == "validation_failed"


@pytest.mark.parametrize(
    ("fails", "says"),
    [
        (lambda: [].pop(), "pop from empty list"),
        (lambda: next(iter(())), "StopIteration"),
        (lambda: os._exit(1), "died"),
    ],
)
def test_why_a_task_failed_is_told_in_a_line_or_by_its_kind(fails, says: str):
    with pytest.raises(RayError) as failed:
        ray.get(ray.remote(max_retries=0)(fails).remote())
    assert says in reason_of(failed.value)
    assert "\n" not in reason_of(failed.value)


def test_a_failure_of_ray_without_words_is_told_by_its_kind():
    assert reason_of(RayError()) == "RayError"
