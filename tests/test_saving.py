"""training/saving.py: a checkpoint made beside the training has the bytes of one it waits for, whatever fails or dies."""

import errno
import multiprocessing
import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest
from safetensors import SafetensorError

from diffusion.store.publish import DiskFull
from diffusion.training import checkpoint
from diffusion.training.saving import Saving
from diffusion.training.step import TrainState, train_step
from tests.test_checkpoint import FACTS, RECIPE, fresh
from tests.test_step import bits_of, emoji  # noqa: F401  (emoji is a fixture)

pytestmark = pytest.mark.usefixtures("one_thread")

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def state(emoji) -> TrainState:  # noqa: F811
    made = fresh()
    train_step(made, emoji, RECIPE)
    return made


@pytest.fixture
def held(monkeypatch) -> threading.Event:
    """Publishing begins when this is set."""
    begin, publish = threading.Event(), checkpoint.publish

    def late(*arguments):
        assert begin.wait(10)
        return publish(*arguments)

    monkeypatch.setattr(checkpoint, "publish", late)
    return begin


def test_bytes_and_digest_are_of_the_moment_though_training_goes_on(state, held, emoji, tmp_path):  # noqa: F811
    waited_for, published = {}, []
    with Saving(tmp_path / "beside", FACTS, lambda *found: published.append(found)) as saving:
        for _ in range(2):  # the second copy is made in the memory of the first
            held.set()
            folder = checkpoint.folder_of(tmp_path / "waiting", state.images_seen)
            waited_for[folder.name] = checkpoint.save(state, folder, FACTS)
            held.clear()
            saving.begin(state)
            train_step(state, emoji, RECIPE)
            held.set()
            saving.wait()
    assert {folder.name: digest for folder, digest in published} == waited_for
    for name in waited_for:
        parts = {path.name: path.read_bytes() for path in (tmp_path / "waiting" / name).iterdir()}
        assert {path.name: path.read_bytes() for path in (tmp_path / "beside" / name).iterdir()} == parts
    again = fresh()
    checkpoint.load(published[-1][0], again, FACTS)
    train_step(again, emoji, RECIPE)
    assert bits_of(again) == bits_of(state)


def test_one_at_a_time_and_the_end_waits_for_the_last(state, held, tmp_path):
    with Saving(tmp_path, FACTS) as saving:
        saving.begin(state)
        assert checkpoint.latest(tmp_path) == (None, [])  # the step has gone on before anything is written
        state.images_seen += 12
        second = threading.Thread(target=saving.begin, args=(state,))
        second.start()
        second.join(0.1)
        assert second.is_alive()
        held.set()
        second.join()
        assert checkpoint.folder_of(tmp_path, 12).exists()
    assert checkpoint.latest(tmp_path) == (checkpoint.folder_of(tmp_path, 24), [])


def test_a_full_disk_is_raised_at_the_step_after_as_what_it_is(state, held, tmp_path, monkeypatch):
    def full(tensors, path):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint, "save_file", full)
    taken = []

    def steps():
        with Saving(tmp_path, FACTS) as saving:
            for step in saving.beside(iter(range(1_000_000))):
                taken.append(step)
                if step == 2:
                    saving.begin(state)
                if step == 4:  # nothing has failed yet, and no step waited
                    held.set()
                    with pytest.raises(DiskFull, match=f"no room for the checkpoint {12:012d} in {tmp_path}"):
                        saving.wait()

    with pytest.raises(DiskFull, match=f"no room for the checkpoint {12:012d} in {tmp_path}") as caught:
        steps()
    assert caught.value.errno == errno.ENOSPC
    assert taken == [0, 1, 2, 3, 4]
    assert list(tmp_path.iterdir()) == []


def test_where_training_fails_what_is_under_way_is_published_and_its_own_failure_is_raised(state, held, tmp_path):
    def steps():
        with Saving(tmp_path, FACTS) as saving:
            saving.begin(state)
            threading.Timer(0.05, held.set).start()
            raise FloatingPointError("the step's")

    with pytest.raises(FloatingPointError, match="the step's"):
        steps()
    assert checkpoint.latest(tmp_path) == (checkpoint.folder_of(tmp_path, 12), [])


def test_where_training_and_its_checkpoint_fail_both_are_told(state, held, tmp_path, monkeypatch):
    def full(tensors, path):
        raise OSError(errno.ENOSPC, "No space left on device")

    def steps(error: Exception | None) -> None:
        with Saving(tmp_path, FACTS, lost=lambda *found: lost.append(found)) as saving:
            held.set()
            saving.begin(state)
            if error:
                raise error
            saving.wait()

    monkeypatch.setattr(checkpoint, "save_file", full)
    lost = []
    with pytest.raises(FloatingPointError, match="the step's"):
        steps(FloatingPointError("the step's"))
    assert [images_seen for images_seen, _ in lost] == [12]
    assert isinstance(lost.pop()[1], DiskFull)
    with pytest.raises(DiskFull):  # what is raised is not told once more
        steps(None)
    assert lost == []


def _save_without_end(state: TrainState, folder: Path) -> None:
    with Saving(folder, FACTS) as saving:
        while True:
            saving.begin(state)
            state.images_seen += 12


def test_killed_at_any_moment_it_leaves_whole_checkpoints_alone(state, tmp_path):
    moments, half_written = random.Random(0), 0
    for _ in range(6):
        child = FORK.Process(target=_save_without_end, args=(state, tmp_path))
        child.start()
        while not (half := list(tmp_path.glob(".tmp-*/*"))):
            time.sleep(0.001)
        time.sleep(moments.random() * 0.05)
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        half_written += bool([path for path in half if path.exists()])
        folders = list(tmp_path.glob("[0-9]*"))
        for folder in folders:
            checkpoint.verify(folder)
        assert checkpoint.latest(tmp_path) == (max(folders, default=None), [])
    assert half_written
