"""A shard stage that is killed, at any point and any number of times, ends with the bytes of one that was not."""

import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest

from diffusion.data import ingest, manifest
from diffusion.store import storage
from diffusion.store.storage import StorageUnavailable
from tests.published import accounts_for, identity
from tests.test_ingest import RECIPE, in_small_chunks, side_files, spoilt_folder  # noqa: F401

FORK = multiprocessing.get_context("fork")


def _shard(source: Path, root: Path, done) -> None:
    """In a process of its own; tells of each task that is done, and of the dataset."""

    def each(function, tasks):
        for task in tasks:
            result = function(task)
            done.send(function.__name__)
            yield result

    done.send(ingest.shard_dataset(source, RECIPE, root, each=each).digest)


@pytest.mark.parametrize("seed", range(2))
def test_killed_at_random_points_it_goes_on_to_the_same_bytes(spoilt_folder, tmp_path, monkeypatch, seed):  # noqa: F811
    in_small_chunks(monkeypatch, 3)
    random_points, kills, done = random.Random(seed), 0, []
    while not done or not done[-1].isalnum():
        ours, theirs = FORK.Pipe(duplex=False)
        child = FORK.Process(target=_shard, args=(spoilt_folder, tmp_path / "root", theirs))
        child.start()
        theirs.close()
        life, delay = random_points.randint(0, 4), random_points.random() * 0.01
        try:
            for _ in range(life):
                done.append(ours.recv())
            time.sleep(delay)  # from the middle of a task to the middle of publishing
            if child.is_alive() and kills < 8:
                os.kill(child.pid, signal.SIGKILL)
                kills += 1
            while True:
                done.append(ours.recv())
        except EOFError:
            child.join()
            ours.close()
    assert kills > 2
    clean = ingest.shard_dataset(spoilt_folder, RECIPE, tmp_path / "clean")
    killed = f"{tmp_path}/root/datasets/{done[-1][:16]}"
    assert done[-1] == clean.digest
    assert identity(killed) == identity(clean.uri)
    assert side_files(killed) == side_files(clean.uri)
    accounts_for(
        killed, {str(p.relative_to(spoilt_folder)) for p in spoilt_folder.rglob("*.*") if p.suffix != ".jsonl"}
    )
    times = Counter(done)
    assert times["decode_chunk"] <= 66 / 3 + kills  # what a kill undoes is the task that was in hand
    assert times["pack_shard"] <= len(manifest.load(clean.uri).shards) + kills
    left = {path.name for path in (tmp_path / "root").iterdir()}
    assert left == {"datasets", "heads", "quarantine", "shards"}


def test_a_storage_that_fails_now_and_then_costs_tries_and_no_bytes(spoilt_folder, tmp_path, monkeypatch):  # noqa: F811
    """Reading, writing and asking fail one time in twenty, at any point of the stage."""
    in_small_chunks(monkeypatch, 3)
    chance = random.Random(5)

    def failing(call):
        def sometimes(*args, **kwargs):
            if chance.random() < 0.05:
                raise StorageUnavailable("no answer")
            return call(*args, **kwargs)

        return sometimes

    with monkeypatch.context() as patch:
        for name in ("read", "put", "size"):
            patch.setattr(storage.LocalFolder, name, failing(getattr(storage.LocalFolder, name)))
        ref, tries = None, 0
        while ref is None:
            with suppress(StorageUnavailable):
                tries += 1
                ref = ingest.shard_dataset(spoilt_folder, RECIPE, tmp_path / "root")
    assert tries > 5
    clean = ingest.shard_dataset(spoilt_folder, RECIPE, tmp_path / "clean")
    assert identity(ref.uri) == identity(clean.uri)
    assert side_files(ref.uri) == side_files(clean.uri)
