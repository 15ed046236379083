"""adapters/ray_train_saver.py without Ray Train, whose context and report stand here; test_ray_train.py has the real one."""

import errno
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray.train

from diffusion.adapters.ray_train_saver import Saver
from diffusion.store.publish import DiskFull
from diffusion.store.storage import LocalFolder, StorageRefused, StorageUnavailable, open_storage
from diffusion.training import checkpoint
from diffusion.training.copies import copies_in
from diffusion.training.journal import SCORE, Journal
from diffusion.training.retention import Keep
from tests.test_checkpoint import FACTS, RECIPE, fresh

pytestmark = pytest.mark.usefixtures("one_thread")

FACTS_OF_EIGHT = FACTS.model_copy(
    update={"recipe": RECIPE.model_copy(update={"checkpoint_images": 12})}
)  # at 12 ... 96


@pytest.fixture
def reported(monkeypatch, tmp_path: Path) -> list[tuple[int, bool]]:
    """What Ray Train hears: images_seen, and whether that checkpoint was published by then."""
    heard = []

    def report(metrics, *, checkpoint, checkpoint_dir_name):
        heard.append((metrics["images_seen"], (tmp_path / "run" / checkpoint_dir_name / "manifest.json").is_file()))

    monkeypatch.setattr(ray.train, "report", report)
    monkeypatch.setattr(ray.train, "get_context", lambda: SimpleNamespace(get_world_rank=lambda: 0))
    return heard


@pytest.mark.parametrize("error", [StorageUnavailable("no answer"), StorageRefused("expired"), OSError("stale")])
def test_each_is_reported_once_it_is_published_and_what_is_superseded_goes(error, reported, tmp_path, monkeypatch):
    run, copies, told = tmp_path / "run", tmp_path / "copies", []
    put = LocalFolder.put

    def not_while_the_third_is_saved(storage, name, data):
        if Path(name).parent.name == f"{36:012d}" and not (run / f"{48:012d}").exists():
            raise error
        put(storage, name, data)

    monkeypatch.setattr(LocalFolder, "put", not_while_the_third_is_saved)
    state = fresh()
    with Saver(
        run, tmp_path, FACTS_OF_EIGHT, told.append, keep=Keep(last=3, moments=(12,)), copies=str(copies)
    ) as saver:
        for state.images_seen in (12, 24, 36, 48, 60):
            saver(state)
    assert reported == [(images_seen, True) for images_seen in (12, 24, 36, 48, 60)]
    stay = [f"{images_seen:012d}" for images_seen in (12, 36, 48, 60)]
    assert [folder.name for folder in checkpoint.folders_in(run)] == stay
    assert copies_in(open_storage(copies)) == stay  # that of the third was made up for
    events = [(event["event"], event["images_seen"]) for event in told]
    assert events == [
        ("checkpoint", 12), ("checkpoint", 24), ("checkpoint", 36), ("checkpoint_not_copied", 36), ("checkpoint", 48),
        ("checkpoint", 60),
    ]  # fmt: skip


def test_the_best_by_the_runs_history_stays_here_and_in_the_copies_and_one_that_went_takes_no_place(reported, tmp_path):
    run, copies, journal = tmp_path / "run", tmp_path / "copies", Journal(tmp_path / "metrics.jsonl")
    state, keep = fresh(), Keep(last=2, best=1)
    there = {}
    with Saver(run, tmp_path, FACTS_OF_EIGHT, lambda event: None, keep=keep, copies=str(copies)) as saver:
        for images_seen, history in (
            (12, ("validating", 12, None)),
            (24, ("validating", 12, None)),
            (36, ("validating", 12, None)),
            (48, ("validated", 12, 7.0)),  # the last that is judged while it is there
            (60, ("validated", 24, 5.0)),  # which went before
            (72, ("validated", 60, 6.0)),
            (84, ("validated", 72, 6.0)),
            (96, ("validating", 96, None)),
        ):
            state.images_seen = images_seen
            saver(state)
            saver._saving.wait()
            name, moment, score = history
            journal.event({"event": name, "images_seen": moment} | ({SCORE: score} if score else {}))
            there[images_seen] = [int(folder.name) for folder in checkpoint.folders_in(run)]
            assert [int(name) for name in copies_in(open_storage(copies))] == there[images_seen]
    assert there == {
        12: [12], 24: [12, 24], 36: [12, 24, 36], 48: [12, 36, 48], 60: [12, 48, 60], 72: [12, 60, 72],
        84: [60, 72, 84], 96: [60, 84, 96],
    }  # fmt: skip


def test_what_failed_to_be_published_is_not_reported(reported, tmp_path, monkeypatch):
    def full(tensors, path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    state, told = fresh(), []
    state.images_seen = 12
    with (
        pytest.raises(DiskFull),
        Saver(tmp_path / "run", tmp_path, FACTS_OF_EIGHT, told.append, keep=Keep(), copies=None) as saver,
    ):
        saver(state)
    assert reported == told == []

    def fails_as_well() -> None:
        with Saver(tmp_path / "run", tmp_path, FACTS_OF_EIGHT, told.append, keep=Keep(), copies=None) as saver:
            saver(state)
            raise FloatingPointError("the step's")

    with pytest.raises(FloatingPointError):
        fails_as_well()
    assert [(event["event"], event["images_seen"]) for event in told] == [("checkpoint_failed", 12)]
    assert told[0]["reason"].startswith("DiskFull: no room for the checkpoint")
    assert reported == []
