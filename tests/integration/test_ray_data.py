"""Sharding on real Ray: the same bytes as in one process, for any parallelism; a worker's failure has its cause, a killed
worker's task is done again."""

import logging
import os
import signal
import threading
import time
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
from ray.data import DataContext
from ray.data._internal.execution import streaming_executor_state as state
from ray.data._internal.execution.resource_manager import ResourceManager

from diffusion.adapters import ray_data
from diffusion.adapters.ray_data import ray_each, shard_dataset
from diffusion.data import ingest
from diffusion.data.pack import decode_chunk, pack_shard
from diffusion.data.quarantine import TooManyRejected
from diffusion.recipe import ShardRecipe
from diffusion.store.publish import DiskFull
from tests.published import identity
from tests.test_ingest import RECIPE, in_small_chunks, side_files, spoilt_folder  # noqa: F401


@pytest.mark.usefixtures("ray_local")
def test_embedded_pictures_have_the_same_bytes_on_ray_and_in_one_process(tmp_path):
    recipe, seen = ShardRecipe(), []
    plain = ingest.shard_dataset("embedded", recipe, tmp_path / "plain")
    one = shard_dataset("embedded", recipe, tmp_path / "one", workers=1)
    many = shard_dataset("embedded", recipe, tmp_path / "many", progress=lambda *state: seen.append(state))
    for other in (one, many):
        assert other.digest == plain.digest
        assert identity(other.uri) == identity(plain.uri)
        assert side_files(other.uri) == side_files(plain.uri)
    assert (plain.images, plain.holdout, plain.rejected) == (1789, 103, 0)  # of 1,906, less 14 duplicates
    assert seen == sorted(seen)
    assert seen[-1] == (1906, 1906)


@pytest.mark.usefixtures("ray_local")
def test_bad_files_are_set_aside_alike(spoilt_folder, tmp_path):  # noqa: F811
    plain = ingest.shard_dataset(spoilt_folder, RECIPE, tmp_path / "plain")
    ray = shard_dataset(spoilt_folder, RECIPE, tmp_path / "ray")
    assert plain.rejected == ray.rejected == 4
    assert identity(plain.uri) == identity(ray.uri)
    with pytest.raises(TooManyRejected):
        shard_dataset(spoilt_folder, RECIPE.model_copy(update={"max_rejected": 0.01}), tmp_path / "ray")


def _killed_once(marks: str, task: dict) -> dict:
    """The task, in a worker that is killed before or after it does it, the first time."""
    name = task.get("blob") or task["digest"]
    mark = Path(marks, name)
    first = not mark.exists()
    mark.touch()
    if first and name[0] in "0123":
        os.kill(os.getpid(), signal.SIGKILL)
    result = (decode_chunk if "blob" in task else pack_shard)(task)
    if first and name[0] in "4567":
        os.kill(os.getpid(), signal.SIGKILL)
    return result


@pytest.mark.usefixtures("ray_local")
def test_killed_shard_workers_lose_and_repeat_nothing(spoilt_folder, tmp_path, monkeypatch):  # noqa: F811
    in_small_chunks(monkeypatch, 5)
    plain = ingest.shard_dataset(spoilt_folder, RECIPE, tmp_path / "plain")
    (tmp_path / "marks").mkdir()

    def each(_, tasks):
        return ray_each(partial(_killed_once, str(tmp_path / "marks")), tasks)

    ref = ingest.shard_dataset(spoilt_folder, RECIPE, tmp_path / "ray", each=each)
    kinds = Counter(mark.name[0] < "8" for mark in (tmp_path / "marks").iterdir())
    assert kinds[True] > 3  # workers that were killed
    assert identity(ref.uri) == identity(plain.uri)
    assert side_files(ref.uri) == side_files(plain.uri)


@pytest.mark.usefixtures("ray_local")
def test_tasks_are_taken_from_a_stream_wave_by_wave(monkeypatch):
    monkeypatch.setattr(ray_data, "_WAVE_TASKS", 5)
    taken = []

    def tasks():
        for n in range(12):
            taken.append(n)
            yield {"n": n}

    results = ray_each(dict, tasks())
    seen = [next(results)["n"]]
    assert taken == list(range(5))
    seen += [result["n"] for result in results]
    assert [sorted(seen[i : i + 5]) for i in (0, 5, 10)] == [list(range(5)), list(range(5, 10)), [10, 11]]


def _fail_on_two(task: dict) -> dict:
    if task["n"] == 2:
        raise OSError(28, "No space left on device")
    return task


def _full_disk(_: dict) -> dict:
    raise DiskFull(28, "no room for a shard in /x, 0 bytes are left on its disk")


def _pid_then_wait(task: dict) -> dict:
    """Writes its process id; the first one to run waits to be killed."""
    with open(task["path"], "a") as file:
        file.write(f"{os.getpid()}\n")
    if len(Path(task["path"]).read_text().split()) == 1:
        time.sleep(60)
    return task


@pytest.mark.usefixtures("ray_local")
def test_results_and_failures_of_tasks():
    assert sorted(result["n"] for result in ray_each(dict, [{"n": n} for n in range(5)])) == list(range(5))
    assert list(ray_each(dict, [])) == []
    with pytest.raises(RuntimeError, match=r"OSError: \[Errno 28\] No space left") as error:
        list(ray_each(_fail_on_two, [{"n": n} for n in range(4)]))
    assert "_fail_on_two" in "".join(error.value.__notes__)
    with pytest.raises(DiskFull, match=r"^no room for a shard in /x, 0 bytes are left") as error:
        list(ray_each(_full_disk, [{}]))
    assert "_full_disk" in "".join(error.value.__notes__)


def _wait_for_the_first(folder: str, task: dict) -> dict:
    """The third task of a group waits for what the test makes of the first one's result, then is killed, once."""
    if task["n"] == 2:
        end = time.monotonic() + 30
        while not Path(folder, "seen").exists():
            assert time.monotonic() < end, "the first result is kept back"
            time.sleep(0.02)
        if not Path(folder, "killed").exists():
            Path(folder, "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
    return task


@pytest.mark.usefixtures("ray_local")
def test_results_of_a_group_come_one_by_one_and_once_though_its_worker_is_killed(tmp_path):
    assert [len(group) for group in ray_data._groups([""] * 40, 2)] == [16, 12, 6, 3, 2, 1]
    tasks = [{"n": n} for n in range(4)]
    results = ray_each(partial(_wait_for_the_first, str(tmp_path)), tasks, workers=1)
    assert next(results) == {"n": 0}
    (tmp_path / "seen").touch()
    assert list(results) == tasks[1:]
    assert (tmp_path / "killed").exists()


def _wait_for_the_other(folder: str, task: dict) -> dict:
    """Returns when another task runs at the same time."""
    Path(folder, str(task["n"])).touch()
    end = time.monotonic() + 30
    while not Path(folder, str(1 - task["n"])).exists():
        assert time.monotonic() < end, "no other task runs beside it"
        time.sleep(0.02)
    return task


@pytest.mark.usefixtures("ray_local")
def test_two_workers_begin_before_ray_data_looks_at_the_cluster_again(tmp_path, monkeypatch):
    monkeypatch.setattr(ResourceManager, "GLOBAL_LIMITS_UPDATE_INTERVAL_S", 3600)
    results = ray_each(partial(_wait_for_the_other, str(tmp_path)), [{"n": 0}, {"n": 1}], workers=2)
    assert sorted(result["n"] for result in results) == [0, 1]
    assert ResourceManager.GLOBAL_LIMITS_UPDATE_INTERVAL_S == 3600


def _pace() -> float:
    return ResourceManager.GLOBAL_LIMITS_UPDATE_INTERVAL_S


@pytest.mark.usefixtures("ray_local")
def test_the_cluster_is_asked_at_ray_s_own_pace_once_the_workers_have_begun(monkeypatch):
    theirs = _pace()
    monkeypatch.setattr(ray_data, "_BEGUN_S", 0.0)
    results = ray_each(dict, [{"n": n} for n in range(3)], workers=1)
    next(results)
    assert (_pace(), state.WAIT_FOR_TASK_COMPLETION_TIMEOUT_S) == (theirs, ray_data._LOOK_S)
    with ray_data._prompt():  # of another thread, whose workers have not begun
        assert _pace() == ray_data._LOOK_S != theirs
    assert len(list(results)) == 2
    assert _pace() == theirs


def _noise() -> tuple[bool, int]:
    return DataContext.get_current().enable_progress_bars, logging.getLogger("ray.data").level


@pytest.mark.parametrize(
    ("block", "setting", "ours"),
    [(ray_data._prompt, _pace, ray_data._LOOK_S), (ray_data.quiet, _noise, (False, logging.ERROR))],
)
def test_ray_data_is_as_it_was_when_the_last_of_two_threads_is_done(block, setting, ours):
    theirs = setting()
    first, second = block(), block()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert setting() == ours != theirs
    second.__exit__(None, None, None)
    assert setting() == theirs


@pytest.mark.usefixtures("ray_local")
def test_a_killed_worker_s_task_is_done_again(tmp_path):
    path = tmp_path / "pids"

    def kill_the_first() -> None:
        while not path.exists() or not path.read_text().endswith("\n"):
            time.sleep(0.05)
        os.kill(int(path.read_text().split()[0]), signal.SIGKILL)

    killer = threading.Thread(target=kill_the_first)
    killer.start()
    results = list(ray_each(_pid_then_wait, [{"path": str(path)}]))
    killer.join()
    assert results == [{"path": str(path)}]
    assert len(path.read_text().split()) == 2
