"""By how much the restoration of equal models differs: `python -m tests.benchmarks.bench_equal_restoration FOLDER`.

Models of the preset `demo` that differ in the seed of their training alone restore the same held-out pictures as an
evaluation does, from the same noise.  Then evaluations of so many pictures are drawn from these, without replacement, and
each model is held against each other one: by how much its median PSNR is lower, and, as the gate does, how often the
interval of the median of the differences, picture by picture, lies below -1 dB where each picture is worse by so many dB.
Worse by 0 is a model as good as the champion.  A model given by `--bundle` is compared with itself under other noise.

What is in FOLDER is not done again.
"""

import argparse
import itertools
import time
from pathlib import Path

import numpy as np
import torch

from diffusion.data.images import to_model, to_uint8
from diffusion.data.reader import ShardReader
from diffusion.evaluation.facts.restoration import of_median
from diffusion.evaluation.metrics.fidelity import psnr
from diffusion.evaluation.plan import evenly
from diffusion.evaluation.restoration import EXACT, Case, case_of, cases_for, restored
from diffusion.serving.engine import Engine
from diffusion.store.bundle import export_bundle, load_bundle
from diffusion.threads import one_thread
from flows.recipes import merged
from tests.evaluated_run import make_run

BATCH = 16
DRAWS = 4_000  # evaluations
LIMIT = merged("demo").gate.max_restoration_loss  # dB
WORSE = (0.0, 1.0, 2.0, 3.0, 4.0)  # dB


def trained(folder: Path, seed: int, images: int) -> str:
    """The bundle of a model of this seed."""
    note = folder / f"bundle-{images}-{seed}"
    if not note.exists():
        recipe = merged("demo", settings=[f"train.images={images}", f"train.seed={seed}"])
        began = time.perf_counter()
        run = make_run("embedded", recipe, folder, steps=images // recipe.train.batch_size)
        note.write_text(export_bundle(run, recipe.evaluate.ema, folder, recipe.evaluate.sampling)[0])
        print(f"trained seed {seed} on {images:,} pictures in {time.perf_counter() - began:.0f} s", flush=True)
    return note.read_text()


def figures(folder: Path, name: str, bundle: str, dataset: str, count: int, noise: int) -> dict[str, np.ndarray]:
    """Task -> PSNR of each picture in dB, (count,); NaN where a picture has no colour to be found."""
    path = folder / f"psnr-{name}-{count}-{noise}.npz"
    if not path.exists():
        began, engine = time.perf_counter(), Engine(load_bundle(bundle), slots=BATCH)
        reader = ShardReader(dataset, "holdout")
        chosen = np.array(evenly(len(reader), count))
        x0, labels = to_model(torch.from_numpy(reader.gather(chosen).images)), torch.from_numpy(reader.labels[chosen])
        found = {}
        for task in cases_for(engine.bundle.spec):
            case = case_of(task, tuple(x0.shape[2:]))
            parts = [
                one(engine, case, x0[rows], labels[rows], rows, noise) for rows in torch.arange(count).split(BATCH)
            ]
            found[task] = np.concatenate(parts)
        np.savez(path, **found)
        print(f"{name}, noise {noise}: {time.perf_counter() - began:.0f} s", flush=True)
    return dict(np.load(path))


def one(
    engine: Engine, case: Case, x0: torch.Tensor, labels: torch.Tensor, rows: torch.Tensor, noise: int
) -> np.ndarray:
    with one_thread():
        made = restored(engine, case, x0, {"label": labels}, rows, seed=noise)
    true = to_uint8(x0)
    found = psnr(to_uint8(made["restored"]), true).clamp(max=EXACT)
    if case.task == "colorization":
        found[psnr(to_uint8(made["guess"]), true).isinf()] = torch.nan
    return found.numpy()


def drawn(first: dict[str, np.ndarray], second: dict[str, np.ndarray], pictures: int, seed: int) -> np.ndarray:
    """(2, DRAWS, tasks): by how much the first one's median is above the second one's, and the upper end of the interval of
    the median of the differences."""
    random, total = np.random.default_rng(seed), len(next(iter(first.values())))
    rows = np.stack([random.permutation(total)[:pictures] for _ in range(DRAWS)])
    medians, ends = [], []
    for task in first:
        one, other = first[task][rows], second[task][rows]
        medians.append(np.nanmedian(one, axis=1) - np.nanmedian(other, axis=1))
        apart = [of_median(pair[np.isfinite(pair)])[2] for pair in one - other]
        ends.append(np.array(apart))
    return np.stack([np.stack(medians, axis=1), np.stack(ends, axis=1)])


def told(pairs: list[np.ndarray], tasks: list[str]) -> None:
    """A row for each task, and how often any of them refuses."""
    medians, ends = np.concatenate(pairs, axis=1)
    print("| | spread of medians, dB | one is lower by more than 1 dB |", end="")
    print(*(f" refused where worse by {worse:g} |" for worse in WORSE))
    print("|---|---|---|" + "---|" * len(WORSE))
    columns = [*zip(tasks, medians.T, ends.T, strict=True), ("any of them", medians.min(axis=1), ends.min(axis=1))]
    for name, median, end in columns:
        shares = " | ".join(f"{(end - worse < -LIMIT).mean():.1%}" for worse in WORSE)
        print(f"| {name} | {median.std():.2f} | {(median < -LIMIT).mean():.1%} | {shares} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=33_000, help="seen in training")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--held-out", type=int, default=96, help="pictures that are restored")
    parser.add_argument("--pictures", type=int, default=16, help="of an evaluation")
    parser.add_argument("--bundle", help="folder of a bundle of such a model, beside those trained here")
    parser.add_argument("--dataset", help="folder of the dataset that it was trained on")
    options = parser.parse_args()
    kinds: dict[str, list[dict[str, np.ndarray]]] = {}
    if options.bundle:
        given = (Path(options.bundle).name, options.bundle, options.dataset, options.held_out)
        kinds["one model, other noise"] = [figures(options.folder, *given, noise) for noise in (0, 1)]
    bundles = [trained(options.folder, seed, options.images) for seed in range(options.seeds)]
    if bundles:
        (dataset,) = (options.folder / "datasets").iterdir()
        kinds[f"{len(bundles)} models of other seeds, the same noise"] = [
            figures(options.folder, f"{options.images}-{seed}", bundle, str(dataset), options.held_out, 0)
            for seed, bundle in enumerate(bundles)
        ]
    for kind, models in kinds.items():
        print(f"\n{kind}; evaluations of {options.pictures} of {options.held_out} held-out pictures")
        tasks = list(models[0])
        print(
            "median PSNR of all:", *(f"{task} {np.round([np.nanmedian(m[task]) for m in models], 2)}" for task in tasks)
        )
        pairs = itertools.permutations(models, 2)
        told([drawn(a, b, options.pictures, number) for number, (a, b) in enumerate(pairs)], tasks)


if __name__ == "__main__":
    main()
