"""What precomputed captions cost and save: `python -m tests.benchmarks.bench_precompute`.

The embedded pictures, in shards of 32, and the preset `emoji-text`.  Cost: making every sidecar in this process and on 1
and 2 actors; the rate leaves out the start and the first quarter, the time of the whole has them.  Saving: the first epoch
of a run on two workers with and without the sidecars, in turns; the times of steps are the workers' own, without the start
of Ray Train.
"""

import argparse
import statistics
import tempfile
import time
from functools import partial
from itertools import pairwise
from pathlib import Path

from diffusion.adapters.ray_cluster import local_ray
from diffusion.adapters.ray_precompute import precompute_dataset
from diffusion.adapters.ray_train import train_run
from diffusion.data import manifest
from diffusion.data.ingest import shard_dataset
from diffusion.data.precompute import captions_of, precompute
from diffusion.data.sidecar import Computation
from diffusion.recipe import PRESETS, TrainRecipe
from diffusion.store.refs import DatasetRef
from diffusion.store.text_encoders import text_identity


def forget(dataset: DatasetRef) -> int:
    """Remove the sidecars.  Returns their bytes."""
    root = manifest.root_of(dataset.uri)
    found = list(root.walk("precomputed"))
    for sidecar in found:
        root.remove(sidecar.name)
    return sum(sidecar.size for sidecar in found)


def cost(dataset: DatasetRef, by: Computation) -> None:
    root = manifest.root_of(dataset.uri)
    captions = sum(len(captions_of(root, entry)) for entry in manifest.load(dataset.uri).shards)
    pictures = dataset.images + dataset.holdout
    ways = {"this process": precompute} | {f"{n} actors": partial(precompute_dataset, actors=n) for n in (1, 2)}
    for name, make in ways.items():
        forget(dataset)
        started, seen = time.perf_counter(), []
        make(dataset, by, progress=lambda done, total, seen=seen: seen.append((time.perf_counter(), done)))
        whole_s = time.perf_counter() - started
        (first_s, first), (last_s, last) = seen[len(seen) // 4], seen[-1]
        per_caption_ms = (last_s - first_s) / (last - first) * pictures / captions * 1e3
        print(f"{name:<13} {per_caption_ms:6.2f} ms a caption, {whole_s:6.1f} s for {captions} captions", flush=True)
    print(f"sidecars: {sum(f.size for f in root.walk('precomputed')) / 2**20:.1f} MiB")


def steps(recipe: TrainRecipe, dataset: DatasetRef) -> list[float]:
    """Seconds of each step of a run, by worker 0."""
    times = []
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:

        def hear(record: dict) -> None:
            times.append((record["images_seen"], record["images_per_s"]))

        train_run(recipe, dataset, Path(folder), workers=2, on_metrics=hear)
    return [(seen - before) / rate for (before, _), (seen, rate) in pairwise([(0, 0.0), *times])]


def saving(dataset: DatasetRef, by: Computation, recipe: TrainRecipe, turns: int) -> None:
    rows = []
    for turn in range(turns):
        found = {}
        for with_them in (False, True) if turn % 2 else (True, False):
            forget(dataset)
            if with_them:
                precompute_dataset(dataset, by, actors=2)
            found[with_them] = steps(recipe, dataset)
        rows.append((found[False][0], found[True][0], sum(found[False]), sum(found[True])))
        print(
            "first step {:.2f} s without, {:.2f} s with; all {:.1f} s without, {:.1f} s with".format(*rows[-1]),
            flush=True,
        )
    first, first_with, whole, whole_with = (statistics.median(column) for column in zip(*rows, strict=True))
    images = -(-recipe.images // recipe.batch_size) * recipe.batch_size
    print(
        f"\nmedians of {turns} turns: first step {first:.2f} s without and {first_with:.2f} s with; the first {images:,}"
        f" pictures {images / whole:.1f} images/s without and {images / whole_with:.1f} with: {whole - whole_with:.1f} s"
        " saved"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--images", type=int, default=1_792, help="of each run: one epoch")
    parser.add_argument("--part", choices=("cost", "saving", "both"), default="both")
    options = parser.parse_args()
    recipe = PRESETS["emoji-text"]()
    train = recipe.train.model_copy(update={"images": options.images, "checkpoint_images": options.images})
    by = Computation(encoder=text_identity(train.text_encoder, tokens=train.text_tokens), device="cpu")
    with tempfile.TemporaryDirectory(prefix="bench-") as folder, local_ray(Path(folder, "ray"), cpus=4):
        dataset = shard_dataset("embedded", recipe.shard.model_copy(update={"shard_size": 32}), folder)
        if options.part != "saving":
            cost(dataset, by)
        if options.part != "cost":
            saving(dataset, by, train, options.turns)


if __name__ == "__main__":
    main()
