"""A sweep on Ray Data: all settings of a round are drawn by the same actors.  Not a byte of it differs."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from diffusion.adapters.ray_actors import Work
from diffusion.adapters.ray_evaluate import results_on_actors, work_of
from diffusion.data.reading import Reading
from diffusion.evaluation.gathered import Result, Setup
from diffusion.evaluation.measure import Progress
from diffusion.evaluation.plan import Task
from diffusion.evaluation.sweep.parts import SweepWorker
from diffusion.evaluation.sweep.sweep import sweep
from diffusion.recipe import EvaluateRecipe, SweepRecipe
from diffusion.store.refs import RunRef, SweepRef


def sweep_run(
    run: RunRef,
    recipe: SweepRecipe,
    evaluate: EvaluateRecipe,
    store_root: str | Path,
    *,
    actors: int,
    use_gpu: bool = False,
    reading: Reading = Reading(),
    progress: Progress | None = None,
) -> SweepRef:
    """`evaluation.sweep.sweep.sweep` on the running Ray, with `actors` actors of one thread or one GPU each."""
    if actors < 1:
        raise ValueError(f"actors={actors}: at least one must draw")
    device = "cuda" if use_gpu else "cpu"
    each = partial(_ray_each, actors=actors, gpus=1 if use_gpu else 0)
    return sweep(run, recipe, evaluate, store_root, each=each, device=device, reading=reading, progress=progress)


def _ray_each(setups: tuple[Setup, ...], tasks: list[Task], *, actors: int, gpus: int) -> Iterator[Result]:
    text = json.dumps([setup.model_dump(mode="json") for setup in setups])
    yield from results_on_actors(_make, text, tasks, actors=actors, gpus=gpus, what="a sweep")


def _make(setups: str) -> Work:
    return work_of(SweepWorker(tuple(Setup.model_validate_json(json.dumps(setup)) for setup in json.loads(setups))))
