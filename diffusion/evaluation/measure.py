"""Measuring a model: the workers' results become a report.

`evaluate` is complete in one process; `diffusion.adapters.ray_evaluate` gives it workers elsewhere.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from diffusion.data import manifest
from diffusion.data.reader import ShardReader
from diffusion.data.reading import Reading
from diffusion.evaluation import plan
from diffusion.evaluation.extractors.features import find_weights, identity_of
from diffusion.evaluation.facts.agreement import agreement_of
from diffusion.evaluation.facts.bound import bound_of
from diffusion.evaluation.facts.by_class import by_class_of
from diffusion.evaluation.facts.distance import floor_of, frechet_of
from diffusion.evaluation.facts.held_out import losses_of
from diffusion.evaluation.facts.memorized import memorization_of, nearest_picture
from diffusion.evaluation.facts.neighbours import kernel_of, neighbours_of
from diffusion.evaluation.facts.restoration import restoration_of, restoration_picture
from diffusion.evaluation.gathered import Gathered, Result, Setup
from diffusion.evaluation.metrics.memorization import Looks
from diffusion.evaluation.plan import Task
from diffusion.evaluation.reference import LIMIT, recall_looks, remember_looks
from diffusion.evaluation.report.report import Environment, Report, class_grid, publish_report, write_report
from diffusion.evaluation.restoration import cases_for
from diffusion.evaluation.rows import Rows
from diffusion.evaluation.worker import Worker
from diffusion.heap import keep_large_apart
from diffusion.recipe import EvaluateRecipe
from diffusion.store.averages import at, wanted_by
from diffusion.store.bundle import export_bundle, verify_bundle
from diffusion.store.joint_encoders import joint_identity
from diffusion.store.refs import DatasetRef, EvaluationRef, ReportRef, RunRef
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
    run = at(run, recipe.images) if recipe.images else run
    setup = setup_of(run, recipe, Path(store_root), device, reading)
    report, pictures = _measured(setup, Path(store_root), each, progress, real)
    return publish_report(report, Path(store_root), run=run, bundle_uri=setup.bundle_uri, pictures=pictures)


def evaluate_bundle(
    bundle: tuple[str, str],
    dataset: DatasetRef,
    recipe: EvaluateRecipe,
    store_root: str | Path,
    *,
    each: Each = in_process,
    device: str = "cpu",
    reading: Reading = Reading(),
    progress: Progress | None = None,
) -> ReportRef:
    """Measure a bundle, (URI, digest), by the pictures of a dataset that need not be those it was trained on, as `evaluate`
    does.  Their classes, size and captions must be its own, see `gate.again`."""
    setup = _setup(bundle, dataset, recipe, device, reading)
    report, pictures = _measured(setup, Path(store_root), each, progress, LIMIT)
    return ReportRef(uri=str(write_report(report, Path(store_root), pictures)), digest=report.digest)


def _measured(
    setup: Setup, store_root: Path, each: Each, progress: Progress | None, real: int
) -> tuple[Report, dict[str, Picture]]:
    """The report, and the pictures beside it."""
    recipe = setup.recipe
    data = manifest.load(setup.dataset_uri, digest=setup.dataset_digest)
    spec, _ = verify_bundle(setup.bundle_uri, setup.bundle_digest)
    labels = ShardReader(setup.dataset_uri, digest=data.digest, cache_mib=0).labels
    drawn = plan.draws(data.train_counts, recipe, labels if spec.text or spec.sizes else None)
    compared = plan.evenly(data.images, real)
    wanted = {"train": compared, "holdout": plan.evenly(data.holdout, real)}
    known = {split: recall_looks(store_root, setup, split, len(some)) for split, some in wanted.items() if some}
    todo = {split: wanted[split] for split, looks in known.items() if looks is None}
    # a student's answers are where its teacher's steps lead, not what is denoised: no loss or bound is of them
    holdout = 0 if spec.lesson else data.holdout
    pixels = spec.codec is None  # a bound on latents would say nothing of pictures
    tasks = plan.tasks(drawn, recipe, real=todo, holdout=holdout, bound=pixels, cases=cases_for(spec))
    results, rows = _collect(each(setup, tasks), tasks, progress, store_root / "features")
    for split in todo:
        known[split] = Looks(rows["real", split]["features"], rows["real", split]["small"])
        remember_looks(store_root, setup, split, known[split])
    problems = sorted({result.problem for result in results.values() if result.problem})
    measured = [draw.label for draw in drawn if draw.measured]
    gathered = Gathered(
        setup=setup,
        manifest=data,
        spec=spec,
        draws=tuple(drawn),
        tasks=tuple(tasks),
        results=results,
        compared=compared,
        real=known["train"].features,
        real_labels=torch.from_numpy(labels[list(compared)]),
        real_small=known["train"].small,
        control=known.get("holdout"),
        control_labels=_labels(setup, wanted["holdout"]),
        drawn=None if problems else rows["draw", "train"]["features"],
        drawn_labels=torch.tensor(measured),
        thumbnails=None if problems else rows["draw", "train"]["thumbnails"],
        agreement=None if problems else rows["draw", "train"].get("agreement"),
        problems=tuple(problems),
    )
    report = _report(gathered)
    return report, _pictures(gathered, report)


def _report(gathered: Gathered) -> Report:
    """What was gathered, measured: one line for each thing, which its own module knows."""
    recipe, spec = gathered.recipe, gathered.spec
    keep_large_apart()
    with one_thread():
        distance, limit = frechet_of(gathered)
        return Report(
            bundle_digest=gathered.setup.bundle_digest,
            run_digest=spec.run_digest,
            recipe_digest=spec.recipe_digest,
            dataset_digest=gathered.manifest.digest,
            classes=gathered.manifest.classes,
            images_seen=spec.images_seen,
            ema=recipe.ema,
            reconstruction=spec.reconstruction,
            guide=spec.guide,
            text=spec.text,
            codec=spec.codec,
            teacher=spec.lesson.teacher if spec.lesson else None,
            chosen_by=recipe.chosen_by,
            frechet=distance,
            frechet_limit=limit,
            floor=floor_of(gathered),
            kernel=kernel_of(gathered),
            neighbours=neighbours_of(gathered),
            held_out=losses_of(gathered),
            bound=bound_of(gathered),
            by_class=by_class_of(gathered),
            agreement=agreement_of(gathered),
            memorization=memorization_of(gathered),
            restoration=restoration_of(gathered),
            seed=recipe.seed,
            problems=gathered.problems,
            environment=Environment(torch=torch.__version__, device=gathered.setup.device),
        )


def _pictures(gathered: Gathered, report: Report) -> dict[str, Picture]:
    """The pictures beside the report, by name."""
    classes = gathered.manifest.classes
    return nearest_picture(gathered, report.memorization) | {
        "grid": class_grid(_drawn_pictures(gathered), classes),
        "real": class_grid(_real_pictures(gathered), classes),
        **restoration_picture(gathered),
    }


def setup_of(run: RunRef, recipe: EvaluateRecipe, store_root: Path, device: str, reading: Reading) -> Setup:
    """What workers must know to measure a run, whose bundle is published below `store_root`."""
    find_weights(recipe.extractor)  # before the bundle is exported: what cannot be measured fails first
    model, guide = wanted_by(recipe, run.images_seen)
    bundle = export_bundle(run, model.sigma_rel, store_root, recipe.sampling, guide)
    return _setup(bundle, run.dataset, recipe, device, reading)


def _setup(
    bundle: tuple[str, str], dataset: DatasetRef, recipe: EvaluateRecipe, device: str, reading: Reading
) -> Setup:
    weights = find_weights(recipe.extractor)
    return Setup(
        bundle_uri=bundle[0],
        bundle_digest=bundle[1],
        dataset_uri=dataset.uri,
        dataset_digest=dataset.digest,
        recipe=recipe,
        extractor=identity_of(recipe.extractor, resolution=recipe.extractor_resolution, weights=weights),
        # the package's own file lies elsewhere on another machine
        weights=None if recipe.extractor == "efficientnet-lite0" else str(weights),
        device=device,
        reading=reading,
        joint=None if recipe.joint == "none" else joint_identity(),
    )


def _collect(
    stream: Iterator[Result], tasks: list[Task], progress: Progress | None, folder: Path
) -> tuple[dict[int, Result], dict[tuple[str, manifest.Split], Rows]]:
    """The results by the number of their task; and what there is of each picture, by kind and split of the tasks, taken
    out of them into files in `folder`."""
    total = sum(len(task.draws) for task in tasks)
    parts: dict[tuple[str, manifest.Split], list[tuple[int, int]]] = {}
    for task in tasks:
        count = len(task.indices) if task.kind == "real" else sum(draw.measured for draw in task.draws)
        parts.setdefault((task.kind, task.split), []).append((task.number, count))
    rows = {key: Rows(folder, each) for key, each in parts.items() if key[0] in ("real", "draw")}
    results, done = {}, 0
    if progress:
        progress(0, total)
    for result in stream:
        task, arrays = tasks[result.number], result.arrays
        if task.kind in ("real", "draw"):
            shown = {name for name in arrays if name.startswith("picture-")}
            rows[task.kind, task.split].put(task.number, {name: arrays.pop(name) for name in arrays.keys() - shown})
        results[result.number] = result
        done += len(task.draws)
        if task.draws and progress:
            progress(done, total)
    missing = [task.number for task in tasks if task.number not in results]
    if missing:
        raise RuntimeError(f"{len(missing)} of {len(tasks)} tasks gave no result, first number {missing[0]}")
    return results, rows


def _labels(setup: Setup, held_out: tuple[int, ...]) -> torch.Tensor:
    """Of held-out pictures, int64."""
    if not held_out:
        return torch.empty(0, dtype=torch.int64)
    reader = ShardReader(setup.dataset_uri, "holdout", digest=setup.dataset_digest, cache_mib=0)
    return torch.from_numpy(reader.labels[list(held_out)])


def _drawn_pictures(gathered: Gathered) -> list[list[Picture]]:
    """The shown pictures, a list for each class; empty where the model gave none."""
    rows: list[list[Picture]] = [[] for _ in gathered.manifest.classes]
    for task, result in gathered.of("draw"):
        shown = [draw for draw in task.draws if draw.shown]
        for draw, picture in zip(shown, result.pictures, strict=False):
            rows[draw.label].append(picture)
    return rows


def _real_pictures(gathered: Gathered) -> list[list[Picture]]:
    """Real training pictures in the grid's layout, evenly spaced within each class."""
    setup = gathered.setup
    reader = ShardReader(setup.dataset_uri, digest=setup.dataset_digest, cache_mib=0)
    rows = []
    for label in range(len(gathered.manifest.classes)):
        members = np.flatnonzero(reader.labels == label)
        chosen = plan.evenly(len(members), gathered.recipe.grid_columns)
        rows.append([reader.read(int(members[i])).image for i in chosen])
    return rows
