"""A few-step student against its teacher: `python -m tests.benchmarks.bench_student`, after
`diffusion run --preset few-steps --until register`; `--home` where that is not .diffusion.

For every student in the store: the Frechet distance of its pictures and seconds a picture, beside those of its teacher as
that is served, and of the teacher hurried: in fewer steps, with and without guidance, so that one sees what of the student's
speed could be had for nothing.  Equal labels, seeds, samples and reference; the distance is that of `diffusion evaluate`.
Seconds are of the engine that serves, `--timed` pictures in batches, medians of turns in which all take part.  Both limits
are on the student of 4 steps.
"""

import argparse
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import torch

from diffusion.data import manifest
from diffusion.evaluation import plan
from diffusion.evaluation.extractors.features import find_weights, identity_of
from diffusion.evaluation.gathered import Setup
from diffusion.evaluation.metrics.frechet import Gaussian
from diffusion.evaluation.metrics.sample import frechet_to
from diffusion.evaluation.reference import LIMIT, ReferenceIdentity, recall
from diffusion.evaluation.worker import Worker
from diffusion.recipe import EvaluateRecipe, SamplingRecipe, canonical_json
from diffusion.sampler import evaluations
from diffusion.serving.engine import Engine
from diffusion.serving.request import GenerateRequest
from diffusion.store.bundle import load_bundle, publish_bundle, verify_bundle
from diffusion.store.bundle_spec import SPEC_NAME, WEIGHTS_NAME, BundleSpec, bundle_path
from diffusion.store.publish import staging
from diffusion.threads import one_thread
from flows.site import Site

EXCESS, SPEED = 1.15, 8.0  # of the student of 4 steps: its distance at most, its speed at least, in the teacher's
HURRIED = (SamplingRecipe(steps=4), SamplingRecipe(steps=4, guidance=1))


class Way(NamedTuple):
    """One way of drawing: a bundle whose own it is."""

    name: str
    folder: str
    digest: str
    spec: BundleSpec

    @property
    def asked(self) -> int:
        """Rows of the network for a picture."""
        sampling = self.spec.sampling
        return evaluations(sampling.sampler, sampling.steps) * (1 if sampling.guidance == 1 else 2)


def students(store: Path) -> dict[str, list[Way]]:
    """The students in the store, fewest steps first, by the digest of their teacher."""
    found: dict[str, list[Way]] = {}
    for path in (store / "bundles").glob(f"*/{SPEC_NAME}"):
        spec, digest = verify_bundle(path.parent)
        if spec.lesson:
            name = f"student, {spec.sampling.steps} steps, {spec.images_seen:,} images"
            found.setdefault(spec.lesson.teacher, []).append(Way(name, str(path.parent), digest, spec))
    return {teacher: sorted(ways, key=lambda way: way.spec.sampling.steps) for teacher, ways in found.items()}


def hurried(teacher: Way, sampling: SamplingRecipe, store: Path) -> Way:
    """The teacher's weights in a bundle that draws otherwise."""
    spec = teacher.spec.model_copy(update={"sampling": sampling, "guide": None})
    with staging(store / "bundles") as folder:
        (folder / WEIGHTS_NAME).write_bytes(Path(teacher.folder, WEIGHTS_NAME).read_bytes())
        (folder / SPEC_NAME).write_bytes(canonical_json(spec))
        uri, digest = publish_bundle(folder, store)
    return Way(f"teacher, {sampling.steps} steps, guidance {sampling.guidance:g}", uri, digest, spec)


def setup_of(way: Way, data: Path, recipe: EvaluateRecipe) -> Setup:
    weights = find_weights(recipe.extractor)
    return Setup(
        bundle_uri=way.folder,
        bundle_digest=way.digest,
        dataset_uri=str(data),
        dataset_digest=way.spec.dataset_digest,
        recipe=recipe,
        extractor=identity_of(recipe.extractor, resolution=recipe.extractor_resolution, weights=weights),
        weights=str(weights),
        device="cpu",
    )


def drawn(way: Way, data: Path, recipe: EvaluateRecipe) -> torch.Tensor:
    """Features of the pictures that `diffusion evaluate` draws."""
    plans = [draw for draw in plan.draws(manifest.load(str(data)).train_counts, recipe) if draw.measured]
    worker = Worker(setup_of(way, data, recipe))
    tasks = plan.tasks(plans, recipe, real={}, holdout=0)
    return torch.from_numpy(np.concatenate([worker(task).arrays["features"] for task in tasks]))


def real(teacher: Way, data: Path, recipe: EvaluateRecipe, store: Path) -> Gaussian:
    """Of the training pictures, as the teacher's evaluation kept their features."""
    known, setup = manifest.load(str(data)), setup_of(teacher, data, recipe)
    identity = ReferenceIdentity(
        dataset_digest=known.digest,
        pictures=len(plan.evenly(known.images, LIMIT)),
        extractor=setup.extractor,
        torch=torch.__version__,
        device=setup.device,
    )
    kept = recall(store, identity)
    if kept is None:
        raise SystemExit(f"{store} has no features of the real pictures: run `diffusion evaluate --preset few-steps`")
    return Gaussian.of(torch.from_numpy(kept))


def seconds(ways: list[Way], *, pictures: int, turns: int) -> list[float]:
    """Seconds a picture of each way, the median of turns in which all take part, after one to warm up."""
    engines = [Engine(load_bundle(way.folder, digest=way.digest), slots=16) for way in ways]
    found: list[list[float]] = [[] for _ in ways]
    for turn in range(turns + 1):
        for engine, way, times in zip(engines, ways, found, strict=True):
            requests = [GenerateRequest(label=way.spec.classes[0], seed=turn, n=pictures)]
            start = time.perf_counter()
            engine.generate(requests)
            if turn:
                times.append((time.perf_counter() - start) / pictures)
    return [statistics.median(times) for times in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, default=None)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--timed", type=int, default=16, help="pictures drawn together for the time")
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    site = Site.from_environment(home=options.home)
    recipe = EvaluateRecipe(samples=options.samples)
    found, passed = students(site.store), True
    if not found:
        raise SystemExit(
            f"no student in {site.store}: make one with `diffusion run --preset few-steps --until register`"
        )
    with TemporaryDirectory() as folder, one_thread():
        for digest, taught in found.items():
            teacher_at = bundle_path(site.store, digest)
            spec, _ = verify_bundle(teacher_at, digest)
            sampling = spec.sampling
            name = f"teacher, {sampling.steps} steps, guidance {sampling.guidance:g}"
            teacher = Way(name, str(teacher_at), digest, spec)
            ways = [teacher, *(hurried(teacher, other, Path(folder)) for other in HURRIED), *taught]
            data = Path(site.store, "datasets", spec.dataset_digest[:16])
            reference = real(teacher, data, recipe, site.store)
            times = seconds(ways, pictures=options.timed, turns=options.turns)
            distances = [frechet_to(reference, drawn(way, data, recipe)) for way in ways]
            print(f"\nteacher {digest[:12]}, {options.samples} samples, one thread")
            for way, distance, took in zip(ways, distances, times, strict=True):
                worse, faster = distance.value / distances[0].value, times[0] / took
                print(
                    f"{way.name:36s} {way.asked:3d} evaluations   Frechet {distance.value:6.0f}"
                    f" ± {distance.standard_error:.0f}   {worse:.3f} of the teacher's   {1e3 * took:6.1f} ms a picture"
                    f"   {faster:5.1f} times as fast"
                )
                if way.spec.lesson and way.spec.sampling.steps == 4:
                    passed = passed and worse <= EXCESS and faster >= SPEED
    print(f"\nlimits of 4 steps: {EXCESS} and {SPEED:g} times: {'passed' if passed else 'FAILED'}")
    raise SystemExit(not passed)


if __name__ == "__main__":
    main()
