"""Sharding on Ray Data: the same tasks as in one process, spread over the cluster.  Not a byte differs.

A source, a root or a work folder that is a folder must be at the same path on every node.
"""

import json
import logging
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from threading import RLock

from diffusion.data import ingest
from diffusion.data.shards import DamagedShard
from diffusion.recipe import ShardRecipe
from diffusion.store.publish import DiskFull
from diffusion.store.refs import DatasetRef
from diffusion.store.storage import Storage, StorageRefused, StorageUnavailable

# errors whose message is for people
_TOLD = {kind.__name__: kind for kind in (DiskFull, StorageRefused, StorageUnavailable, DamagedShard, ValueError)}
_WAVE_TASKS = 2048
_WAVE_BYTES = 2**26  # of tasks as text
_GROUP_TASKS = 16  # that a worker gets in one go, and does again where it is killed
_LOOK_S = 0.05  # how often Ray Data looks after its workers while it works for us
_BEGUN_S = 1.0  # after this long Ray Data knows what the cluster has, and asks at its own pace again
_open: dict[Callable, list] = {}  # what sets something of Ray Data's -> Ray's own, once for each block that is open
_changing = RLock()  # re-entrant: an abandoned block may end wherever memory is collected


def shard_dataset(
    source: str | Path,
    recipe: ShardRecipe,
    root: str | Path | Storage,
    work: Path | None = None,
    *,
    fresh: bool = False,
    progress: ingest.Progress | None = None,
    workers: int | None = None,
) -> DatasetRef:
    """`ingest.shard_dataset` on the running Ray; at most `workers` tasks at a time, or as many as there are CPUs."""
    each = partial(ray_each, workers=workers)
    return ingest.shard_dataset(source, recipe, root, work, fresh=fresh, progress=progress, each=each)


def ray_each(function: Callable[[dict], dict], tasks: Iterable[dict], *, workers: int | None = None) -> Iterator[dict]:
    """`map(function, tasks)` by Ray Data; results come as they are done.  `tasks` may be any number: a wave of them is in
    memory at a time, and the next is taken when its results are.

    Raises what `function` raises where that is of `_TOLD`, ValueError for others of its kind, and else RuntimeError; the
    worker's traceback is a note.
    """
    # JSON text, since columns of nested values would be given one type over all rows
    texts = (json.dumps(task) for task in tasks)
    while wave := list(_wave(texts)):
        yield from _ray_wave(function, wave, workers)


def _wave(texts: Iterator[str]) -> Iterator[str]:
    size = 0
    for text in islice(texts, _WAVE_TASKS):
        yield text
        size += len(text)
        if size > _WAVE_BYTES:
            return


def _ray_wave(function: Callable[[dict], dict], wave: list[str], workers: int | None) -> Iterator[dict]:
    import pyarrow as pa
    import ray

    with quiet(), _prompt():
        cpus = int(ray.cluster_resources().get("CPU", 1))
        rows = ray.data.from_blocks([pa.table({"task": group}) for group in _groups(wave, workers or cpus)])
        rows.context.target_max_block_size = 1  # a result goes on its way with the next, not with its whole group
        done = rows.map(partial(_apply, function), compute=ray.data.TaskPoolStrategy(size=workers))
        begun = time.monotonic()
        for row in done.iter_rows():
            if begun and time.monotonic() >= begun + _BEGUN_S:
                _ask_less()
                begun = 0.0
            if row["error"]:
                raise failure(row, "a sharding task failed on a worker")
            yield json.loads(row["result"])


def _groups(wave: list[str], workers: int) -> Iterator[list[str]]:
    """The wave in groups for a worker each, which shrink so that all workers end at once  [Polychronopoulos and Kuck 1987].

    Ray Data looks after its workers now and then: one that has done its tasks waits, the longer the more there are.
    """
    start = 0
    while start < len(wave):
        size = min(_GROUP_TASKS, -(-(len(wave) - start) // workers))
        yield wave[start : start + size]
        start += size


def _apply(function: Callable[[dict], dict], row: dict) -> dict:
    try:
        return {"result": json.dumps(function(json.loads(row["task"]))), "error": "", "traceback": ""}
    except Exception as error:  # Ray would wrap it in pages of its own and lose the cause
        return {"result": ""} | fault(error)


def fault(error: Exception) -> dict[str, str]:
    """The columns of a row that tell why a task failed; without an error both are ""."""
    name = type(error).__name__
    if name in _TOLD:
        told = [name, *error.args]
    elif isinstance(error, ValueError) and not isinstance(error, UnicodeError):
        told = ["ValueError", str(error)]
    else:
        told = ["", f"{name}: {error}"]
    return {"error": json.dumps(told, default=str), "traceback": "".join(traceback.format_exception(error))}


def failure(row: dict[str, str], what: str) -> Exception:
    """What to raise for a row with a `fault`: the error itself where it is of `_TOLD`, else a RuntimeError about `what`; the
    worker's traceback is a note."""
    name, *told = json.loads(row["error"])
    error = _TOLD[name](*told) if name else RuntimeError(f"{what}: {told[0]}")
    error.add_note(row["traceback"])
    return error


@contextmanager
def quiet() -> Iterator[None]:
    """No bars and no log lines of Ray Data: we report progress ourselves."""
    with _instead(_set_noise, (False, logging.ERROR)):
        yield


@contextmanager
def _prompt() -> Iterator[None]:
    """Ray Data learns what the cluster has when it asks again, after 1 s, and lets a single task run until then; and it
    takes results and gives out tasks every 0.1 s.  In the block it does both every `_LOOK_S`.
    """
    with _instead(_set_pace, (_LOOK_S, _LOOK_S)):
        yield


def _ask_less() -> None:
    """In a block of `_prompt`, when its workers have begun: each question for what the cluster has takes 1 ms of processor,
    which two workers on two cores have not got."""
    with _changing:
        asking, _ = _open[_set_pace][0]
        _set_pace((asking, _LOOK_S))


@contextmanager
def _instead(swap: Callable[[tuple], tuple], ours: tuple) -> Iterator[None]:
    """Settings of the process are `ours` until the last block of any thread ends; then they are Ray's own again.  swap: sets
    them, and returns what they were."""
    with _changing:
        blocks, theirs = _open.setdefault(swap, []), swap(ours)
        blocks.append(blocks[0] if blocks else theirs)
    try:
        yield
    finally:
        with _changing:
            theirs = blocks.pop()
            if not blocks:
                swap(theirs)


def _set_noise(now: tuple[bool, int]) -> tuple[bool, int]:
    """Whether there are bars, and the least that is logged."""
    import ray

    context, logger = ray.data.DataContext.get_current(), logging.getLogger("ray.data")
    before = context.enable_progress_bars, logger.level
    context.enable_progress_bars, level = now
    logger.setLevel(level)
    return before


def _set_pace(now: tuple[float, float]) -> tuple[float, float]:
    """Seconds between questions for what the cluster has, and between looks at the tasks.  Ray 2.60 has no option for it."""
    from ray.data._internal.execution import streaming_executor_state as state
    from ray.data._internal.execution.resource_manager import ResourceManager

    before = ResourceManager.GLOBAL_LIMITS_UPDATE_INTERVAL_S, state.WAIT_FOR_TASK_COMPLETION_TIMEOUT_S
    ResourceManager.GLOBAL_LIMITS_UPDATE_INTERVAL_S, state.WAIT_FOR_TASK_COMPLETION_TIMEOUT_S = now
    return before
