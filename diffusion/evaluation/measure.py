"""Measuring a model: the workers' results become a report.

`evaluate` is complete in one process; `diffusion.adapters.ray_evaluate` gives it workers elsewhere.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from diffusion.data import manifest
from diffusion.data.reader import ShardReader
from diffusion.data.reading import Reading
from diffusion.evaluation import plan
from diffusion.evaluation.bound import HeldOutBound
from diffusion.evaluation.features import find_weights, identity_of
from diffusion.evaluation.plan import Draw, Task
from diffusion.evaluation.reference import LIMIT, ReferenceIdentity, recall, remember
from diffusion.evaluation.report import (
    Environment,
    FloorFacts,
    Frechet,
    FrechetIdentity,
    HeldOutLoss,
    Report,
    publish_report,
)
from diffusion.evaluation.stats import Gaussian, digits, floor, frechet_to
from diffusion.evaluation.worker import Result, Setup, Worker
from diffusion.recipe import EvaluateRecipe
from diffusion.store.averages import at, wanted_by
from diffusion.store.bundle import export_bundle, verify_bundle
from diffusion.store.refs import EvaluationRef, RunRef
from diffusion.threads import one_thread

Progress = Callable[[int, int], None]  # pictures drawn, pictures to draw
Picture = np.ndarray  # uint8 (H, W, 3)
Each = Callable[[Setup, list[Task]], Iterator[Result]]  # results in any order


def in_process(setup: Setup, tasks: list[Task]) -> Iterator[Result]:
    """The tasks, one after the other, here."""
    yield from map(Worker(setup), tasks)


def evaluate(
    run: RunRef,
    recipe: EvaluateRecipe,
    store_root: str | Path,
    *,
    each: Each = in_process,
    device: str = "cpu",
    reading: Reading = Reading(),
    progress: Progress | None = None,
    real: int = LIMIT,
) -> EvaluationRef:
    """Export the bundle of the averages `wanted_by` the recipe, draw with it, measure, publish the report below
    store_root/evaluations.

    real: training pictures that the drawn ones are compared with, at most, evenly spaced.
    The same run and recipe give the same report, byte for byte, on any number of workers.
    """
    store_root = Path(store_root)
    run = at(run, recipe.images) if recipe.images else run
    data = manifest.load(run.dataset.uri, digest=run.dataset.digest)
    setup = _setup(run, recipe, store_root, device, reading)
    spec, _ = verify_bundle(setup.bundle_uri, setup.bundle_digest)
    labels = ShardReader(run.dataset.uri, digest=data.digest, cache_mib=0).labels
    drawn = plan.draws(data.train_counts, recipe, labels if spec.text or spec.sizes else None)
    compared = plan.evenly(data.images, real)
    identity = ReferenceIdentity(
        dataset_digest=data.digest,
        pictures=len(compared),
        extractor=setup.extractor,
        torch=torch.__version__,
        device=device,
    )
    known = recall(store_root, identity)
    # of latents it would say nothing of pictures
    todo = () if known is not None else compared
    # a student's answers are where its teacher's steps lead, not what is denoised: no loss or bound is of them
    holdout = 0 if spec.lesson else data.holdout
    tasks = plan.tasks(drawn, recipe, real=todo, holdout=holdout, bound=spec.codec is None)
    results = _collect(each(setup, tasks), tasks, progress)
    if known is None:
        known = _gathered([results[task.number] for task in tasks if task.kind == "real"], "features")
        remember(store_root, identity, known)
    real_features = torch.from_numpy(known)
    real_labels = torch.from_numpy(labels[list(compared)])
    problems = sorted({result.problem for result in results.values() if result.problem})
    drawing = [results[task.number] for task in tasks if task.kind == "draw"]
    losses = [_level(recipe, task, results[task.number]) for task in tasks if task.kind == "loss"]
    parts = [results[task.number].arrays for task in tasks if task.kind == "bound"]
    report = Report(
        bundle_digest=setup.bundle_digest,
        run_digest=run.digest,
        recipe_digest=run.recipe_digest,
        dataset_digest=data.digest,
        classes=data.classes,
        images_seen=run.images_seen,
        ema=recipe.ema,
        reconstruction=spec.reconstruction,
        guide=spec.guide,
        text=spec.text,
        codec=spec.codec,
        teacher=spec.lesson.teacher if spec.lesson else None,
        frechet=None if problems else _distance(setup, drawing, real_features, captions=spec.text is not None),
        floor=_floor(recipe, real_features, real_labels),
        held_out=tuple(losses),
        bound=HeldOutBound.of(parts, recipe, data.digest) if parts else None,
        seed=recipe.seed,
        problems=tuple(problems),
        environment=Environment(torch=torch.__version__, device=device),
    )
    return publish_report(
        report,
        store_root,
        run=run,
        bundle_uri=setup.bundle_uri,
        drawn=_by_class(drawn, tasks, results, len(data.classes)),
        real=_real_pictures(run, recipe.grid_columns, len(data.classes)),
    )


def _setup(run: RunRef, recipe: EvaluateRecipe, store_root: Path, device: str, reading: Reading) -> Setup:
    weights = find_weights(recipe.extractor)  # before the bundle is exported: what cannot be measured fails first
    identity = identity_of(recipe.extractor, resolution=recipe.extractor_resolution, weights=weights)
    model, guide = wanted_by(recipe, run.images_seen)
    bundle_uri, bundle_digest = export_bundle(run, model.sigma_rel, store_root, recipe.sampling, guide)
    return Setup(
        bundle_uri=bundle_uri,
        bundle_digest=bundle_digest,
        dataset_uri=run.dataset.uri,
        dataset_digest=run.dataset.digest,
        recipe=recipe,
        extractor=identity,
        # the package's own file lies elsewhere on another machine
        weights=None if recipe.extractor == "efficientnet-lite0" else str(weights),
        device=device,
        reading=reading,
    )


def _collect(stream: Iterator[Result], tasks: list[Task], progress: Progress | None) -> dict[int, Result]:
    total = sum(len(task.draws) for task in tasks)
    results, done = {}, 0
    if progress:
        progress(0, total)
    for result in stream:
        results[result.number] = result
        drawn = len(tasks[result.number].draws)
        done += drawn
        if drawn and progress:
            progress(done, total)
    missing = [task.number for task in tasks if task.number not in results]
    if missing:
        raise RuntimeError(f"{len(missing)} of {len(tasks)} tasks gave no result, first number {missing[0]}")
    return results


def _gathered(results: list[Result], name: str) -> np.ndarray:
    return np.concatenate([result.arrays[name] for result in results if name in result.arrays])


def _distance(setup: Setup, results: list[Result], real: torch.Tensor, *, captions: bool) -> Frechet:
    """The Frechet distance of the drawn pictures, by `results` of the drawing tasks, from the real ones."""
    recipe = setup.recipe
    with one_thread():
        distance = frechet_to(Gaussian.of(real), torch.from_numpy(_gathered(results, "features")))
    identity = FrechetIdentity(
        dataset_digest=setup.dataset_digest,
        reference_pictures=len(real),
        extractor=setup.extractor,
        dimensions=real.shape[1],
        samples=recipe.samples,
        captions="of training pictures of the class" if captions else None,
        sampling=recipe.sampling,
        batch_size=recipe.batch_size,
        seed=recipe.seed,
    )
    return Frechet.of(distance, identity)


def _floor(recipe: EvaluateRecipe, real: torch.Tensor, labels: torch.Tensor) -> FloorFacts | None:
    if len(real) < 4:
        return None
    with one_thread():
        return FloorFacts.of(floor(real, labels, recipe.samples, seed=recipe.seed))


def _level(recipe: EvaluateRecipe, task: Task, result: Result) -> HeldOutLoss:
    loss, zero = result.arrays["loss"], result.arrays["zero"]
    error = float(loss.std(ddof=1)) / math.sqrt(len(loss)) if len(loss) > 1 else math.nan
    return HeldOutLoss(
        sigma=recipe.loss_levels[task.level],
        loss=digits(float(loss.mean())),
        standard_error=digits(error),
        zero=digits(float(zero.mean())),
        pictures=len(loss),
    )


def _by_class(drawn: list[Draw], tasks: list[Task], results: dict[int, Result], classes: int) -> list[list[Picture]]:
    """The shown pictures, a list for each class; empty where the model gave none."""
    rows: list[list[Picture]] = [[] for _ in range(classes)]
    for task in tasks:
        shown = [draw for draw in task.draws if draw.shown]
        for draw, picture in zip(shown, results[task.number].pictures, strict=False):
            rows[draw.label].append(picture)
    return rows


def _real_pictures(run: RunRef, columns: int, classes: int) -> list[list[Picture]]:
    """Real training pictures in the grid's layout, evenly spaced within each class."""
    reader = ShardReader(run.dataset.uri, digest=run.dataset.digest, cache_mib=0)
    rows = []
    for label in range(classes):
        members = np.flatnonzero(reader.labels == label)
        rows.append([reader.read(int(members[i])).image for i in plan.evenly(len(members), columns)])
    return rows
