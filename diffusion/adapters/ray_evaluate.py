"""Evaluation on Ray Data: the same tasks as in one process, done by actors.  Not a byte of the report differs.

The bundle, the dataset and an extractor's own weights must be at the same path on every node.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import safetensors.numpy

from diffusion.adapters.ray_actors import Work, on_actors
from diffusion.data.reading import Reading
from diffusion.evaluation.gathered import Result, Setup
from diffusion.evaluation.measure import Each, Progress, evaluate, evaluate_bundle
from diffusion.evaluation.plan import Task
from diffusion.evaluation.worker import Worker
from diffusion.recipe import EvaluateRecipe
from diffusion.store.refs import DatasetRef, EvaluationRef, ReportRef, RunRef


def evaluate_run(
    run: RunRef,
    recipe: EvaluateRecipe,
    store_root: str | Path,
    *,
    actors: int,
    use_gpu: bool = False,
    reading: Reading = Reading(),
    progress: Progress | None = None,
) -> EvaluationRef:
    """`evaluation.measure.evaluate` on the running Ray, with `actors` actors of one thread or one GPU each.

    progress(done, total) hears drawn pictures.
    """
    device, each = _workers(actors, use_gpu)
    return evaluate(run, recipe, store_root, each=each, device=device, reading=reading, progress=progress)


def evaluate_published(
    bundle: tuple[str, str],
    dataset: DatasetRef,
    recipe: EvaluateRecipe,
    store_root: str | Path,
    *,
    actors: int,
    use_gpu: bool = False,
    reading: Reading = Reading(),
    progress: Progress | None = None,
) -> ReportRef:
    """`evaluation.measure.evaluate_bundle` likewise."""
    device, each = _workers(actors, use_gpu)
    return evaluate_bundle(
        bundle, dataset, recipe, store_root, each=each, device=device, reading=reading, progress=progress
    )


def _workers(actors: int, use_gpu: bool) -> tuple[str, Each]:
    """Their device, and what hands them the tasks."""
    if actors < 1:
        raise ValueError(f"actors={actors}: at least one must draw")
    return "cuda" if use_gpu else "cpu", partial(_ray_each, actors=actors, gpus=1 if use_gpu else 0)


def _ray_each(setup: Setup, tasks: list[Task], *, actors: int, gpus: int) -> Iterator[Result]:
    """Results of the tasks as they are done.  Raises RuntimeError with the actor's traceback as a note."""
    yield from results_on_actors(_make, setup.model_dump_json(), tasks, actors=actors, gpus=gpus, what="an evaluation")


def results_on_actors(
    make: Callable[[str], Work], setup: str, tasks: list[Task], *, actors: int, gpus: int, what: str
) -> Iterator[Result]:
    """Results of the tasks as they are done by the work that `make` makes of `setup` in each actor.  See `on_actors`."""
    texts = [task.model_dump_json() for task in tasks]
    for row in on_actors(make, setup, texts, _row(Result(-1, {})), actors=actors, gpus=gpus, what=what):
        yield Result(row["number"], safetensors.numpy.load(row["arrays"]), row["problem"], row["seconds"])


def work_of(worker: Callable[[Task], Result]) -> Work:
    """A worker as `results_on_actors` calls it."""
    return lambda task: _row(worker(Task.model_validate_json(task)))


def _make(setup: str) -> Work:
    return work_of(Worker(Setup.model_validate_json(setup)))


def _row(result: Result) -> dict:
    arrays = safetensors.numpy.save(result.arrays)
    return {"number": result.number, "arrays": arrays, "problem": result.problem, "seconds": result.seconds}
