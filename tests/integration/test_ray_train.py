"""adapters/ray_train.py on a real Ray, with real pictures; workers and the driver are killed for real."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffusion.adapters.ray_train import TrainingFailed, train_run
from diffusion.data import manifest
from diffusion.data.ingest import shard_dataset
from diffusion.data.reader import ShardReader
from diffusion.data.reading import Reading
from diffusion.data.shards import read_index
from diffusion.recipe import Lesson, SamplingRecipe, ShardRecipe, TrainRecipe, UNetRecipe, digest_of
from diffusion.store.bundle import export_bundle, load_model
from diffusion.store.refs import DatasetRef, RunRef
from diffusion.store.storage import open_storage
from diffusion.store.text_encoders import text_encoder
from diffusion.training import checkpoint
from diffusion.training.copies import copies_in
from diffusion.training.figures import FIGURES
from diffusion.training.retention import Keep
from diffusion.training.step import NonFiniteLoss
from tests.test_loop import CLOCKS
from tests.words import reading

RECIPE = TrainRecipe(
    unet=UNetRecipe(channels=16, multipliers=(1, 2), blocks=(1, 1), attention=()),
    images=12 * 40,
    batch_size=12,
    warmup_images=24,
    checkpoint_images=96,
    window=16,
    streams=2,
)
END = 12 * 40


@pytest.fixture(scope="module")
def dataset(emoji_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> DatasetRef:
    recipe = ShardRecipe(resolution=16, shard_size=16, holdout=0.1)
    return shard_dataset(emoji_folder, recipe, tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def undisturbed(ray_local: None, dataset: DatasetRef, tmp_path_factory: pytest.TempPathFactory) -> RunRef:
    """A run on two workers that nothing befell."""
    return train_run(RECIPE, dataset, tmp_path_factory.mktemp("undisturbed"), workers=2)


def run_dir_of(run: RunRef) -> Path:
    return Path(run.uri).parent.parent


def bits(run: RunRef) -> dict[str, bytes]:
    """The weights, averages and optimizer state of a run's end."""
    return {path.name: path.read_bytes() for path in Path(run.uri).glob("*.safetensors")}


def history(run: RunRef) -> tuple[list[dict], list[dict]]:
    """Metrics and events of a run, as its folder has them."""
    lines = [json.loads(line) for line in (run_dir_of(run) / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "event" not in line], [line for line in lines if "event" in line]


def numbers(run: RunRef) -> list[dict]:
    return [{k: v for k, v in record.items() if k not in (*CLOCKS, *FIGURES, "time")} for record in history(run)[0]]


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_run_leaves_checkpoints_history_and_a_reference(undisturbed: RunRef, dataset: DatasetRef):
    assert undisturbed.images_seen == END
    assert undisturbed.recipe_digest == digest_of(RECIPE)
    assert undisturbed.dataset == dataset
    assert undisturbed.digest == digest_of(checkpoint.verify(Path(undisturbed.uri)))
    assert sorted(path.name for path in run_dir_of(undisturbed).iterdir()) == ["checkpoints", "metrics.jsonl"]
    saved = [int(path.name) for path in sorted(Path(undisturbed.uri).parent.iterdir())]
    assert saved == [96, 192, 288, 384, 480]
    metrics, events = history(undisturbed)
    assert [record["images_seen"] for record in metrics] == list(range(12, END + 1, 12))
    assert all(record["mfu"] > 0 and record["memory_mib"] > 100 for record in metrics)
    assert [event["event"] for event in events] == ["started"] + ["checkpoint"] * 5
    assert events[0]["world"] == 2
    assert events[-1]["digest"] == undisturbed.digest
    facts = checkpoint.read_facts(Path(undisturbed.uri))
    assert (facts.world, facts.threads, facts.device) == (2, 1, "cpu")


def test_a_killed_worker_costs_no_bit(undisturbed: RunRef, dataset: DatasetRef, tmp_path: Path):
    workers: list[int] = []
    killed: list[int] = []
    events: list[dict] = []

    def on_event(event: dict) -> None:
        events.append(event)
        if "pids" in event:
            workers[:] = event["pids"]

    def on_metrics(record: dict) -> None:
        if record["images_seen"] >= 96 and not killed:
            killed.append(workers[1])
            os.kill(workers[1], signal.SIGKILL)

    run = train_run(RECIPE, dataset, tmp_path, workers=2, on_metrics=on_metrics, on_event=on_event)
    assert killed
    resumed = next(event for event in events if event["event"] == "resumed")
    assert resumed["images_seen"] >= 96  # what was saved is not done again
    assert resumed["images_seen"] % 96 == 0
    assert killed[0] not in resumed["pids"]
    assert resumed["changed"] == {}
    assert bits(run) == bits(undisturbed)
    assert numbers(run) == numbers(undisturbed)  # each moment once, and the same


def test_a_killed_driver_costs_no_bit(undisturbed: RunRef, dataset: DatasetRef, tmp_path: Path, short_tmp: Path):
    (tmp_path / "dataset.json").write_text(dataset.model_dump_json())
    (tmp_path / "recipe.json").write_text(RECIPE.model_dump_json())
    driver = subprocess.Popen(
        [sys.executable, "-c", _DRIVER, str(tmp_path), str(short_tmp / "killed")],
        env={name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
    )
    checkpoints = tmp_path / "run" / "checkpoints"
    try:
        deadline = time.monotonic() + 480
        while checkpoint.latest(checkpoints)[0] is None:
            assert driver.poll() is None, "the driver ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        driver.kill()
        driver.wait()
    assert checkpoint.read_facts(checkpoint.latest(checkpoints)[0]).images_seen < END
    run = train_run(RECIPE, dataset, tmp_path / "run", workers=2)
    assert [event["event"] for event in history(run)[1]].count("resumed") == 1
    assert bits(run) == bits(undisturbed)


_DRIVER = """
import sys
from pathlib import Path
from diffusion.adapters.ray_cluster import local_ray
from diffusion.adapters.ray_train import train_run
from diffusion.recipe import TrainRecipe
from diffusion.store.refs import DatasetRef

folder = Path(sys.argv[1])
recipe = TrainRecipe.model_validate_json((folder / "recipe.json").read_text())
dataset = DatasetRef.model_validate_json((folder / "dataset.json").read_text())
with local_ray(Path(sys.argv[2]), cpus=4):
    train_run(recipe, dataset, folder / "run", workers=2)
"""


def test_workers_stop_when_the_driver_turns_away(ray_local: None, dataset: DatasetRef, tmp_path: Path):
    class Interrupted(Exception):
        pass

    pids: list[int] = []

    def on_event(event: dict) -> None:
        pids.extend(event.get("pids", []))

    def on_metrics(record: dict) -> None:
        raise Interrupted

    long = RECIPE.model_copy(update={"images": 12 * 100_000})
    with pytest.raises(Interrupted):
        train_run(long, dataset, tmp_path, workers=2, on_event=on_event, on_metrics=on_metrics)
    deadline = time.monotonic() + 120
    while any(is_alive(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_in_the_exact_mode_one_worker_comes_to_the_checkpoint_of_two(
    ray_local: None, dataset: DatasetRef, tmp_path: Path
):
    recipe = RECIPE.model_copy(update={"micro_batch": 3})
    one, two = (
        train_run(recipe, dataset, tmp_path / str(workers), workers=workers, threads=2 // workers) for workers in (1, 2)
    )
    assert one.digest == two.digest  # of every file: weights, averages, optimizer, facts
    assert numbers(one) == numbers(two)
    with pytest.raises(ValueError, match="3 workers cannot sum in the order in which one does: choose 1 or 2 or 4"):
        train_run(recipe, dataset, tmp_path / "3", workers=3)


def test_every_worker_reads_the_captions_of_its_pictures(ray_local: None, dataset: DatasetRef, tmp_path: Path):
    recipe = RECIPE.model_copy(update={"optimizer": "adamw", "precision": "fp32", "images": 96})
    told = reading(recipe, tokens=20, width=384)
    runs = [train_run(told, dataset, tmp_path / str(workers), workers=workers) for workers in (1, 2)]
    for a, b in zip(*map(numbers, runs), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-3)
    facts = [checkpoint.read_facts(Path(run.uri)) for run in runs]
    assert facts[0].text == facts[1].text == text_encoder("minilm", tokens=20).identity


def test_a_finished_run_is_not_trained_again(undisturbed: RunRef, dataset: DatasetRef):
    heard: list[dict] = []
    again = train_run(
        RECIPE, dataset, run_dir_of(undisturbed), workers=2, on_metrics=heard.append, on_event=heard.append
    )
    assert again == undisturbed
    assert heard == []


def test_what_stays_is_copied_and_a_damaged_last_checkpoint_is_made_again_from_the_one_before(
    undisturbed: RunRef, dataset: DatasetRef, tmp_path: Path
):
    copies, keep = str(tmp_path / "copies"), Keep(last=2, moments=(96,))
    kept = [f"{moment:012d}" for moment in (96, 384, 480)]
    run_dir, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    # recomputing changes no bit
    run = train_run(RECIPE, dataset, run_dir, workers=2, recompute=True, keep=keep, copies=copies)
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == kept == copies_in(open_storage(copies))
    weights = Path(run.uri, "weights.safetensors")
    data = weights.read_bytes()
    weights.unlink()  # a copy on the same disk is a link to it
    weights.write_bytes(data[:-4])
    events: list[dict] = []
    again = train_run(RECIPE, dataset, run_dir, workers=2, on_event=events.append)
    assert [event["event"] for event in events] == ["damaged_checkpoint", "resumed", "checkpoint"]
    assert str(weights) in events[0]["reason"]
    assert again == run
    assert bits(again) == bits(undisturbed)
    events.clear()  # where there is nothing, the end is fetched, and what an evaluation asks for
    fetched = train_run(RECIPE, dataset, elsewhere, workers=2, keep=keep, copies=copies, on_event=events.append)
    assert [event["event"] for event in events] == ["fetched_checkpoint"]
    assert sorted(path.name for path in (elsewhere / "checkpoints").iterdir()) == [kept[0], kept[-1]]
    assert fetched.digest == run.digest
    assert bits(fetched) == bits(undisturbed)


def test_a_run_goes_on_with_its_weights_divided_over_the_workers(
    undisturbed: RunRef, dataset: DatasetRef, tmp_path: Path
):
    before = Path(undisturbed.uri).with_name(f"{384:012d}")
    shutil.copytree(before, tmp_path / "checkpoints" / before.name)
    events: list[dict] = []
    run = train_run(RECIPE, dataset, tmp_path, workers=2, shard_weights=True, on_event=events.append)
    assert [event["event"] for event in events] == ["resumed", "checkpoint"]
    assert events[0]["changed"] == {"sharded": (False, True)}
    assert run.digest == events[1]["digest"] == digest_of(checkpoint.verify(Path(run.uri)))
    start, whole, divided = (
        load_file(folder / "weights.safetensors") for folder in (before, Path(undisturbed.uri), Path(run.uri))
    )
    for name, weight in whole.items():
        assert (weight - divided[name]).norm() < 0.1 * (weight - start[name]).norm()


def test_what_cannot_be_is_refused_before_any_worker_starts(undisturbed: RunRef, dataset: DatasetRef, tmp_path: Path):
    other = RECIPE.model_copy(update={"lr": 0.5})
    with pytest.raises(ValueError, match=rf"train\.lr is {RECIPE.lr}, asked 0\.5"):
        train_run(other, dataset, run_dir_of(undisturbed), workers=2)
    with pytest.raises(ValueError, match="batch_size=12 cannot be divided over 5 workers"):
        train_run(RECIPE, dataset, tmp_path, workers=5)
    with pytest.raises(ValueError, match=r"DIFFUSION_SHARD_WEIGHTS\) are summed in an order that depends on it"):
        train_run(RECIPE.model_copy(update={"micro_batch": 6}), dataset, tmp_path, workers=2, shard_weights=True)


def test_a_non_finite_loss_reaches_the_driver_by_name_and_is_not_retried(
    ray_local: None, dataset: DatasetRef, tmp_path: Path
):
    recipe = RECIPE.model_copy(update={"lr": 1e30, "warmup_images": 0, "precision": "fp32"})
    events: list[dict] = []
    with pytest.raises(NonFiniteLoss) as caught:
        train_run(recipe, dataset, tmp_path, workers=2, on_event=events.append)
    assert [event["event"] for event in events] == ["started"]
    assert len(caught.value.samples) == 12  # of both workers
    assert caught.value.images_seen == 12
    assert caught.value.samples[0][0] in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_failing_worker_is_explained_in_one_line(ray_local: None, dataset: DatasetRef, tmp_path: Path):
    root = tmp_path / "copy"
    shutil.copytree(Path(dataset.uri).parent.parent, root)
    uri = str(root / "datasets" / Path(dataset.uri).name)
    shards = [root / entry.tar for entry in manifest.load(uri).entries("train")]
    for shard in shards:
        shard.unlink()
    events: list[dict] = []
    with pytest.raises(TrainingFailed, match="|".join(shard.name for shard in shards)) as caught:
        train_run(
            RECIPE,
            dataset.model_copy(update={"uri": uri}),
            tmp_path / "run",
            workers=2,
            max_failures=0,
            on_event=events.append,
        )
    assert "Traceback" not in str(caught.value)
    assert len(str(caught.value)) < 600
    assert "worker_failed" in [event["event"] for event in events]


def test_a_damaged_picture_is_told_of_by_who_reads_it_and_too_many_stop_the_run(
    ray_local: None, dataset: DatasetRef, tmp_path: Path
):
    root = tmp_path / "copy"
    shutil.copytree(Path(dataset.uri).parent.parent, root)
    copy = dataset.model_copy(update={"uri": str(root / "datasets" / Path(dataset.uri).name)})
    sound = ShardReader(copy.uri)
    index = read_index(sound.root, sound.entries[1])
    tar = root / sound.entries[1].tar
    data = bytearray(tar.read_bytes())
    for row in index[:2]:
        data[int(row["image_offset"]) + int(row["image_size"]) - 20] ^= 1
    tar.write_bytes(data)
    recipe = RECIPE.model_copy(update={"images": 12 * 5})  # more than an epoch
    with pytest.raises(TrainingFailed, match=rf"2 of {len(sound)} pictures are damaged, and 1 are allowed.*{tar.name}"):
        train_run(recipe, copy, tmp_path / "stops", workers=1, max_failures=0)
    run = train_run(recipe, copy, tmp_path / "goes on", workers=2, reading=Reading(max_damaged=0.1))
    damaged = [event for event in history(run)[1] if event["event"] == "damaged_sample"]
    assert {event["rank"] for event in damaged} <= {0, 1}
    assert {(event["shard"], event["key"], event["pictures"]) for event in damaged} == {
        (sound.entries[1].tar, row["key"].decode(), 1) for row in index[:2]
    }


def test_a_run_starts_from_a_model(undisturbed: RunRef, dataset: DatasetRef, tmp_path: Path):
    """With no learning rate to speak of it ends where it started; its model says what that was."""
    uri, digest = export_bundle(undisturbed, 0.1, tmp_path, SamplingRecipe())
    still = {"init": digest, "images": 24, "lr": 1e-12, "optimizer": "adamw", "seed": 1}
    recipe = RECIPE.model_copy(update=still)
    events: list[dict] = []
    run = train_run(recipe, dataset, tmp_path / "run", workers=2, origin=Path(uri), on_event=events.append)
    assert events[0] == {"event": "warm_started", "model": digest, "kept": dataset.classes, "new": (), "dropped": ()}
    model = load_model(uri)[1]
    reached = load_file(Path(run.uri) / "weights.safetensors")
    assert all(torch.allclose(reached[name], weight, atol=1e-9) for name, weight in model.named_parameters())
    made, _ = load_model(export_bundle(run, 0.1, tmp_path, SamplingRecipe())[0])
    assert made.init == digest
    wide = recipe.unet.model_copy(update={"channels": 32})
    with pytest.raises(ValueError, match="channels=16"):
        train_run(recipe.model_copy(update={"unet": wide}), dataset, tmp_path / "other", origin=Path(uri))
    student = SamplingRecipe(sampler="ddim", guidance=1)
    taught = {"lesson": Lesson(teacher=digest, by=SamplingRecipe(), student=student), "unet": wide}
    with pytest.raises(ValueError, match=rf"train\.unet is .*, and the teacher {digest[:12]} has"):
        train_run(RECIPE.model_copy(update=taught), dataset, tmp_path / "other", teacher=Path(uri))
