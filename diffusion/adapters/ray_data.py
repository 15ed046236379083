"""Sharding on Ray Data: the same tasks as in one process, spread over the cluster.  Not a byte differs.

The source and the store must be at the same path on every node.
"""

import json
import logging
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from diffusion.data import ingest
from diffusion.recipe import ShardRecipe
from diffusion.store.refs import DatasetRef


def shard_dataset(
    source: str | Path,
    recipe: ShardRecipe,
    store_root: str | Path,
    *,
    progress: ingest.Progress | None = None,
    workers: int | None = None,
) -> DatasetRef:
    """`ingest.shard_dataset` on the running Ray; at most `workers` tasks at a time, or as many as there are CPUs."""
    each = partial(ray_each, workers=workers)
    return ingest.shard_dataset(source, recipe, store_root, progress=progress, each=each)


def ray_each(function: Callable[[dict], dict], tasks: list[dict], *, workers: int | None = None) -> Iterator[dict]:
    """`map(function, tasks)` as a Ray Data pipeline; results come as they are done.

    Raises RuntimeError with the worker's traceback as a note where `function` raises.
    """
    import ray

    if not tasks:
        return
    # JSON text, since columns of nested values would be given one type over all rows
    with quiet():
        rows = ray.data.from_items([{"task": json.dumps(task)} for task in tasks], override_num_blocks=len(tasks))
        done = rows.map(partial(_apply, function), compute=ray.data.TaskPoolStrategy(size=workers))
        for row in done.iter_rows():
            if row["error"]:
                failure = RuntimeError(f"a sharding task failed on a worker: {row['error']}")
                failure.add_note(row["traceback"])
                raise failure
            yield json.loads(row["result"])


def _apply(function: Callable[[dict], dict], row: dict) -> dict:
    try:
        return {"result": json.dumps(function(json.loads(row["task"]))), "error": "", "traceback": ""}
    except Exception as error:  # Ray would wrap it in pages of its own and lose the cause
        return {"result": "", "error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}


@contextmanager
def quiet() -> Iterator[None]:
    """No bars and no log lines of Ray Data: we report progress ourselves."""
    import ray

    context, logger = ray.data.DataContext.get_current(), logging.getLogger("ray.data")
    bars, level = context.enable_progress_bars, logger.level
    context.enable_progress_bars = False
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        context.enable_progress_bars = bars
        logger.setLevel(level)
