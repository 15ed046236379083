"""A sweep: ways of drawing with one run, measured in rounds of more and more samples, of which one is chosen.

`sweep` is complete in one process; `diffusion.adapters.ray_sweep` gives it workers elsewhere.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from diffusion.data import manifest
from diffusion.data.reader import ShardReader
from diffusion.data.reading import Reading
from diffusion.evaluation import plan
from diffusion.evaluation.gathered import Result, Setup
from diffusion.evaluation.measure import Progress, setup_of
from diffusion.evaluation.metrics.frechet import Gaussian
from diffusion.evaluation.metrics.memorization import Looks
from diffusion.evaluation.metrics.sample import frechet_to
from diffusion.evaluation.plan import Draw, Task
from diffusion.evaluation.reference import LIMIT, recall, reference_for, remember_looks
from diffusion.evaluation.report.report import Environment
from diffusion.evaluation.sweep.choice import Candidate, beaten, choice, evaluations_of, front, rounds
from diffusion.evaluation.sweep.parts import Parts, SweepWorker
from diffusion.evaluation.sweep.report import Sweep, Tried, publish_sweep
from diffusion.recipe import EvaluateRecipe, Setting, SweepRecipe, digest_of, grid, tuned
from diffusion.store.averages import at
from diffusion.store.bundle import verify_bundle
from diffusion.store.publish import withdraw
from diffusion.store.refs import RunRef, SweepRef
from diffusion.threads import one_thread

Each = Callable[[tuple[Setup, ...], list[Task]], Iterator[Result]]  # results in any order


def in_process(setups: tuple[Setup, ...], tasks: list[Task]) -> Iterator[Result]:
    """The tasks, one after the other, here."""
    yield from map(SweepWorker(setups), tasks)


@dataclass
class _Found:
    """What is known of a setting so far."""

    number: int
    setting: Setting
    evaluations: int
    features: dict[tuple[int, int], np.ndarray] = field(default_factory=dict)  # by class and ordinal
    seconds: list[float] = field(default_factory=list)  # a picture, of each task
    tried: Tried | None = None
    problem: str | None = None


def sweep(
    run: RunRef,
    recipe: SweepRecipe,
    evaluate: EvaluateRecipe,
    store_root: str | Path,
    *,
    each: Each = in_process,
    device: str = "cpu",
    reading: Reading = Reading(),
    progress: Progress | None = None,
    real: int = LIMIT,
) -> SweepRef:
    """Try the settings of the grid on a run and publish what was found below store_root/sweeps.

    Every setting draws the same pictures by class and seed, first few, then more; one that is worse beyond doubt than
    another that takes no longer is dropped, see `sweep_choice`.  What was drawn before an interruption is not drawn again.
    The same run and recipes give the same sweep.json, byte for byte, on any number of workers.
    Raises ValueError where no setting gives pictures.
    """
    store_root = Path(store_root)
    run = at(run, evaluate.images) if evaluate.images else run
    data = manifest.load(run.dataset.uri, digest=run.dataset.digest)
    found = [
        _Found(number, setting, evaluations_of(tuned(evaluate, setting).sampling))
        for number, setting in enumerate(grid(recipe, evaluate))
    ]
    # a folder of this sweep's own: whoever else publishes bundles must not find one of these gone
    work = digest_of({"run": run.digest, "sweep": digest_of(recipe), "evaluate": digest_of(evaluate)})
    bundles = store_root / "sweeps" / f".work-{work[:16]}"
    base = evaluate.model_copy(update={"samples": recipe.samples, "seed": recipe.seed})
    setups = tuple(
        setup_of(run, base.model_copy(update={"ema": ema}), bundles, device, reading)
        for ema in dict.fromkeys(one.setting.ema for one in found)
    )
    spec, _ = verify_bundle(setups[0].bundle_uri, setups[0].bundle_digest)
    labels = ShardReader(run.dataset.uri, digest=data.digest, cache_mib=0).labels
    reference = _reference(setups, base, store_root, plan.evenly(data.images, real), each)
    gaussian = Gaussian.of(torch.from_numpy(reference))
    parts = Parts(store_root / "sweeps" / ".parts", setups)

    def draw(alive: list[_Found], samples: int) -> list[Draw]:
        few = base.model_copy(update={"samples": samples})
        wanted = plan.draws(data.train_counts, few, labels if spec.text or spec.sizes else None)
        measured = [draw._replace(shown=False) for draw in wanted if draw.measured]
        _draw(alive, measured, setups, parts, each, _told(progress, found, alive, recipe.samples))
        return measured

    candidates = _compete(found, recipe, draw, gaussian)
    best, chosen, certain = choice(candidates, recipe.tolerance, recipe.confidence)
    if progress:
        progress(len(found) * recipe.samples, len(found) * recipe.samples)
    result = Sweep(
        run_digest=run.digest,
        recipe_digest=run.recipe_digest,
        dataset_digest=data.digest,
        images_seen=run.images_seen,
        extractor=setups[0].extractor,
        reference_pictures=len(reference),
        sampling=evaluate.sampling,
        batch_size=evaluate.batch_size,
        sweep=recipe,
        tried=tuple(_tried(one) for one in found),
        front=front(candidates),
        best=best,
        chosen=chosen,
        certain=certain,
        environment=Environment(torch=torch.__version__, device=device),
    )
    ref = publish_sweep(result, store_root, run, [min(one.seconds, default=None) for one in found])
    withdraw(bundles)
    return ref


def _compete(
    found: list[_Found], recipe: SweepRecipe, draw: Callable[[list[_Found], int], list[Draw]], reference: Gaussian
) -> list[Candidate]:
    """Round by round, until all samples are drawn or one setting is left.  Returns those that were not dropped.

    draw: draws so many samples of each and returns which they are.
    """
    alive, candidates = found, []
    for samples in rounds(recipe):
        draws = draw(alive, samples)
        alive = [one for one in alive if one.problem is None]
        candidates = [_measured(one, draws, reference) for one in alive]
        dropped = beaten(candidates, recipe.confidence)
        for one in alive:
            one.tried = one.tried.model_copy(update={"dropped_for": dropped.get(one.number)})
        alive = [one for one in alive if one.number not in dropped]
        candidates = [candidate for candidate in candidates if candidate.number not in dropped]
        if len(alive) < 2:
            break
    if not alive:
        raise ValueError(f"no setting of the sweep gives pictures; of {found[0].setting}: {found[0].problem}")
    return candidates


def _reference(
    setups: tuple[Setup, ...], base: EvaluateRecipe, store_root: Path, compared: tuple[int, ...], each: Each
) -> np.ndarray:
    """Features of the training pictures that the drawn ones are compared with, computed once."""
    known = recall(store_root, reference_for(setups[0], len(compared)))
    if known is None:
        tasks = plan.tasks([], base, real={"train": compared}, holdout=0, bound=False)
        results = {result.number: result for result in each(setups, tasks)}
        known, small = (
            np.concatenate([results[task.number].arrays[name] for task in tasks]) for name in ("features", "small")
        )
        remember_looks(store_root, setups[0], "train", Looks(torch.from_numpy(known), torch.from_numpy(small)))
    return known


def _draw(
    alive: Sequence[_Found],
    draws: list[Draw],
    setups: tuple[Setup, ...],
    parts: Parts,
    each: Each,
    told: Callable[[], None],
) -> None:
    """Draw what is not drawn yet of each setting."""
    size, tasks, by_number = setups[0].recipe.batch_size, [], {}
    for one in alive:
        new = [draw for draw in draws if (draw.label, draw.ordinal) not in one.features]
        for start in range(0, len(new), size):
            task = Task(number=len(tasks), kind="draw", draws=tuple(new[start : start + size]), setting=one.setting)
            tasks.append(task)
            by_number[task.number] = one
    known = {task.number: result for task in tasks if (result := parts.find(task))}
    for number, result in known.items():
        _take(by_number[number], tasks[number], result)
    told()
    for result in each(setups, [task for task in tasks if task.number not in known]):
        parts.keep(tasks[result.number], result)
        _take(by_number[result.number], tasks[result.number], result)
        told()


def _take(one: _Found, task: Task, result: Result) -> None:
    if result.problem:
        one.problem = min(filter(None, (one.problem, result.problem)))  # the same on any number of workers
        return
    for draw, row in zip(task.draws, result.arrays["features"], strict=True):
        one.features[draw.label, draw.ordinal] = row
    one.seconds.append(result.seconds / len(task.draws))


def _measured(one: _Found, draws: list[Draw], reference: Gaussian) -> Candidate:
    """The distance of the pictures drawn so far; it is noted in `one`."""
    features = np.stack([one.features[draw.label, draw.ordinal] for draw in draws])
    with one_thread():
        distance = frechet_to(reference, torch.from_numpy(features))
    one.tried = Tried.of(one.setting, one.evaluations, len(draws), distance)
    return Candidate(one.number, one.evaluations, distance)


def _tried(one: _Found) -> Tried:
    known = one.tried or Tried(setting=one.setting, evaluations=one.evaluations, samples=0)
    return known.model_copy(update={"problem": one.problem})


def _told(
    progress: Progress | None, found: Sequence[_Found], alive: Sequence[_Found], samples: int
) -> Callable[[], None]:
    """Tells how many pictures are drawn, or need not be."""
    going = {one.number for one in alive}

    def tell() -> None:
        if progress:
            drawn = (len(one.features) if one.number in going else samples for one in found)
            progress(sum(drawn), len(found) * samples)

    return tell
