"""training/copies.py on a folder: what is copied comes back whole, or not at all; test_checkpoints_s3.py has it on S3."""

import shutil
from pathlib import Path

import pytest

from diffusion.store.averages import MANIFEST_NAME
from diffusion.store.storage import LocalFolder, StorageUnavailable
from diffusion.training import checkpoint
from diffusion.training.copies import (
    bring,
    bring_best,
    bring_newest,
    copies_in,
    remove,
    send,
    send_measured,
    send_missing,
    settle,
)
from diffusion.training.journal import SCORE, Journal, judged_in, measurements_in
from diffusion.training.retention import Keep
from tests.test_checkpoint import FACTS, RECIPE, runs, trained  # noqa: F401  (fixtures: two checkpoints, at 12 and 24)
from tests.test_step import emoji  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")

FIRST, SECOND = f"{12:012d}", f"{24:012d}"


@pytest.fixture
def bucket(tmp_path_factory) -> LocalFolder:
    """What holds copies of its own: a put of a file may be a link to it."""

    class Copying(LocalFolder):
        def put(self, name: str, data: bytes | Path) -> None:
            super().put(name, data if isinstance(data, bytes) else data.read_bytes())

    return Copying(tmp_path_factory.mktemp("bucket"))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_an_empty_folder_gets_the_newest_copy_with_the_same_bytes(runs, bucket, tmp_path_factory):  # noqa: F811
    send_missing(runs, bucket)
    assert copies_in(bucket) == [FIRST, SECOND]
    elsewhere, heard = tmp_path_factory.mktemp("elsewhere"), []
    bring_newest(elsewhere, bucket, heard.append)
    assert checkpoint.latest(elsewhere) == (elsewhere / SECOND, [])
    assert files(elsewhere / SECOND) == files(runs / SECOND)
    assert [(event["event"], event["images_seen"]) for event in heard] == [("fetched_checkpoint", 24)]
    assert [path.name for path in elsewhere.iterdir()] == [SECOND]
    bring_newest(elsewhere, bucket, heard.append)
    assert checkpoint.latest(elsewhere) == (elsewhere / SECOND, [])  # it is here now
    assert len(heard) == 1


@pytest.mark.parametrize("name", ["weights.safetensors", "ema-0.1.safetensors", "state.json", MANIFEST_NAME])
def test_a_damaged_copy_is_named_and_gives_way_to_the_one_before(runs, bucket, tmp_path_factory, name):  # noqa: F811
    send_missing(runs, bucket)
    flip(bucket.folder / SECOND / name)
    elsewhere, heard = tmp_path_factory.mktemp("elsewhere"), []
    bring_newest(elsewhere, bucket, heard.append)
    assert checkpoint.latest(elsewhere) == (elsewhere / FIRST, [])
    assert [event["event"] for event in heard] == ["damaged_checkpoint", "fetched_checkpoint"]
    assert f"{bucket.uri}/{SECOND}/{name}" in heard[0]["reason"]
    assert "replaced when the run comes by again" in heard[0]["reason"]
    assert [path.name for path in elsewhere.iterdir()] == [FIRST]
    send(runs / SECOND, bucket)  # the run comes by again
    bring_newest(elsewhere, bucket, heard.append)
    assert checkpoint.latest(elsewhere) == (elsewhere / SECOND, [])


def test_a_copy_without_its_manifest_does_not_count_and_one_that_lacks_a_file_is_damaged(runs, bucket, tmp_path):  # noqa: F811
    send_missing(runs, bucket)
    bucket.remove(f"{FIRST}/{MANIFEST_NAME}")
    assert copies_in(bucket) == [SECOND]
    bucket.remove(f"{SECOND}/optimizer.safetensors")
    with pytest.raises(checkpoint.DamagedCheckpoint, match=rf"{SECOND}/optimizer\.safetensors.*it is not there"):
        bring(SECOND, bucket, tmp_path / "elsewhere")


def test_a_damaged_checkpoint_here_is_set_aside_for_its_copy(runs, bucket):  # noqa: F811
    send_missing(runs, bucket)
    sound = files(runs / SECOND)
    flip(runs / SECOND / "weights.safetensors")
    assert checkpoint.latest(runs)[0] == runs / FIRST
    bring_newest(runs, bucket, lambda event: None)
    assert checkpoint.latest(runs) == (runs / SECOND, [])
    assert files(runs / SECOND) == sound
    assert (runs / f"{SECOND}.damaged-1").exists()


def test_an_interrupted_copy_never_counts_and_is_made_up_for(runs, bucket, monkeypatch):  # noqa: F811
    send(runs / FIRST, bucket)
    put, left = bucket.put, 2

    def fails(name, data):
        nonlocal left
        left -= 1
        if left < 0:
            raise StorageUnavailable("no answer")
        put(name, data)

    monkeypatch.setattr(bucket, "put", fails)
    with pytest.raises(StorageUnavailable):
        send(runs / SECOND, bucket)
    assert copies_in(bucket) == [FIRST]
    left = 2
    with pytest.raises(StorageUnavailable):  # of what is whole, too, nothing half replaced is left to be believed
        send(runs / FIRST, bucket)
    assert copies_in(bucket) == []
    left = 1_000
    send_missing(runs, bucket)
    assert copies_in(bucket) == [FIRST, SECOND]


def test_what_is_damaged_here_is_not_copied_and_what_is_removed_is_gone(runs, bucket):  # noqa: F811
    flip(runs / FIRST / "weights.safetensors")
    send_missing(runs, bucket)
    assert copies_in(bucket) == [SECOND]
    remove({SECOND}, bucket)
    remove({SECOND}, bucket)
    assert list(bucket.walk()) == []


def test_at_the_end_of_a_run_a_removal_that_failed_is_made_up_for(runs, bucket, monkeypatch):  # noqa: F811
    send_missing(runs, bucket)
    recipe = RECIPE.model_copy(update={"images": 36, "checkpoint_images": 12})
    last = runs / f"{36:012d}"
    shutil.copytree(runs / SECOND, last)
    take_away, left = bucket.remove, 2

    def fails(name):
        nonlocal left
        left -= 1
        if left < 0:
            raise StorageUnavailable("no answer")
        take_away(name)

    monkeypatch.setattr(bucket, "remove", fails)
    with pytest.raises(StorageUnavailable):
        remove({FIRST}, bucket)
    assert copies_in(bucket) == [SECOND]
    assert any(found.name.startswith(FIRST) for found in bucket.walk()), "of half a removal something is left"
    left = 1_000
    settle(runs, runs.parent / "none.jsonl", bucket, recipe, Keep(last=2))
    assert copies_in(bucket) == [SECOND, last.name]
    assert not any(found.name.startswith(FIRST) for found in bucket.walk())


def test_a_damaged_copy_of_a_run_that_has_ended_tells_how_to_have_it_made_again(runs, bucket):  # noqa: F811
    recipe, keep = RECIPE.model_copy(update={"images": 24, "checkpoint_images": 12}), Keep(last=2, moments=(12,))
    send_missing(runs, bucket)
    shutil.rmtree(runs / FIRST)
    flip(bucket.folder / FIRST / "weights.safetensors")
    with pytest.raises(checkpoint.DamagedCheckpoint, match="delete it and all later ones") as told:
        settle(runs, runs.parent / "none.jsonl", bucket, recipe, keep)
    assert f"{bucket.uri}/{FIRST}/weights.safetensors, fetched twice" in str(told.value)
    assert "comes by" not in str(told.value)
    remove({FIRST}, bucket)
    settle(runs, runs.parent / "none.jsonl", bucket, recipe, keep)
    assert copies_in(bucket) == [SECOND]


def test_an_empty_folder_gets_the_best_and_what_was_measured_and_a_full_one_nothing(runs, bucket, tmp_path):  # noqa: F811
    here, history, events = Journal(tmp_path / "here.jsonl"), tmp_path / "there.jsonl", []
    elsewhere = tmp_path / "elsewhere"
    bring_best(elsewhere, history, 1, bucket, events.append)  # nothing was measured, nor copied
    here.event({"event": "validated", "images_seen": 12, "recipe": "few", SCORE: 3.0})
    here.event({"event": "validated", "images_seen": 6, "recipe": "few", SCORE: 1.0})  # it went
    here.event({"event": "validating", "images_seen": 24})
    send_missing(runs, bucket)
    send_measured(tmp_path / "here.jsonl", bucket)
    assert copies_in(bucket) == [FIRST, SECOND]
    Journal(history).event({"event": "validated", "images_seen": 24, "recipe": "few", SCORE: 4.0})
    for _ in range(2):
        bring_best(elsewhere, history, 1, bucket, events.append)
        assert judged_in(history).scores == {"few": {24: 4.0, 12: 3.0, 6: 1.0}}
        assert [record["images_seen"] for record in measurements_in(history)] == [24, 12, 6]
        assert judged_in(history).under_way is None
        assert [folder.name for folder in checkpoint.folders_in(elsewhere)] == [FIRST]
        assert [(event["event"], event["images_seen"]) for event in events] == [("fetched_checkpoint", 12)]
    assert files(elsewhere / FIRST) == files(runs / FIRST)
