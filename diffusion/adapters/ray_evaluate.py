"""Evaluation on Ray Data: the same tasks as in one process, done by actors.  Not a byte of the report differs.

The bundle, the dataset and an extractor's own weights must be at the same path on every node.
"""

import traceback
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import safetensors.numpy

from diffusion.adapters.ray_data import quiet
from diffusion.evaluation.measure import Progress, evaluate
from diffusion.evaluation.plan import Task
from diffusion.evaluation.worker import Result, Setup, Worker
from diffusion.recipe import EvaluateRecipe
from diffusion.store.refs import EvaluationRef, RunRef

_CPUS = 0.5  # that an actor claims: actors that claim every CPU leave none to the tasks that feed them, and all wait


def evaluate_run(
    run: RunRef,
    recipe: EvaluateRecipe,
    store_root: str | Path,
    *,
    actors: int,
    use_gpu: bool = False,
    progress: Progress | None = None,
) -> EvaluationRef:
    """`evaluation.measure.evaluate` on the running Ray, with `actors` actors of one thread or one GPU each.

    progress(done, total) hears drawn pictures.
    """
    if actors < 1:
        raise ValueError(f"actors={actors}: at least one must draw")
    device = "cuda" if use_gpu else "cpu"
    each = partial(_ray_each, actors=actors, gpus=1 if use_gpu else 0)
    return evaluate(run, recipe, store_root, each=each, device=device, progress=progress)


def _ray_each(setup: Setup, tasks: list[Task], *, actors: int, gpus: int) -> Iterator[Result]:
    """Results of the tasks as they are done.  Raises RuntimeError with the actor's traceback as a note."""
    import ray

    with quiet():
        rows = ray.data.from_items([{"task": task.model_dump_json()} for task in tasks], override_num_blocks=len(tasks))
        done = rows.map(
            _Actor,
            fn_constructor_args=(setup.model_dump_json(),),
            compute=ray.data.ActorPoolStrategy(size=min(actors, len(tasks)), max_tasks_in_flight_per_actor=2),
            num_cpus=_CPUS,
            num_gpus=gpus,
        )
        for row in done.iter_rows():
            if row["error"]:
                failure = RuntimeError(f"an evaluation task failed in an actor: {row['error']}")
                failure.add_note(row["traceback"])
                raise failure
            yield Result(row["number"], safetensors.numpy.load(row["arrays"]), row["problem"])


class _Actor:
    """A worker behind rows of plain values: arrays of many shapes share no column."""

    def __init__(self, setup: str) -> None:
        self.setup = setup
        self.worker: Worker | None = None  # made by the first task, whose row can carry an error; a constructor cannot

    def __call__(self, row: dict) -> dict:
        task = Task.model_validate_json(row["task"])
        try:
            if self.worker is None:
                self.worker = Worker(Setup.model_validate_json(self.setup))
            result = self.worker(task)
        except Exception as error:  # Ray would wrap it in pages of its own and lose the cause
            fault = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
            return {"number": task.number, "arrays": b"", "problem": "", **fault}
        arrays = safetensors.numpy.save(result.arrays)
        return {"number": task.number, "arrays": arrays, "problem": result.problem, "error": "", "traceback": ""}
