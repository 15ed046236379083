"""What precomputed captions cost and save: `python -m tests.benchmarks.bench_precompute`.

The embedded pictures, in shards of 32, and the preset `emoji-text`.  Cost: making every sidecar on 1 and on 2 actors, in
turns; the rate leaves out the start and the first quarter.  Saving: each batch's captions are computed and found, and a step
is made with them; a caption is new once a run, and from then on remembered.
"""

import argparse
import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import torch

from diffusion.adapters.ray_cluster import local_ray
from diffusion.adapters.ray_precompute import precompute_dataset
from diffusion.data import manifest
from diffusion.data.ingest import shard_dataset
from diffusion.data.precompute import captions_of, precompute
from diffusion.data.reader import ShardReader
from diffusion.data.reading_order import order_of
from diffusion.data.sidecar import Computation, Sidecars
from diffusion.data.stream import batches
from diffusion.presets import PRESETS
from diffusion.recipe import TrainRecipe
from diffusion.store.refs import DatasetRef
from diffusion.store.text_encoders import text_encoder, text_identity
from diffusion.text import looking_up
from diffusion.training.corrupt import caption_condition, dropped_of
from diffusion.training.step import build_state, train_step


def forget(dataset: DatasetRef) -> int:
    """Remove the sidecars.  Returns their bytes."""
    root = manifest.root_of(dataset.uri)
    found = list(root.walk("precomputed"))
    for sidecar in found:
        root.remove(sidecar.name)
    return sum(sidecar.size for sidecar in found)


def cost(dataset: DatasetRef, by: Computation, turns: int) -> None:
    root = manifest.root_of(dataset.uri)
    shards = manifest.load(dataset.uri).shards
    captions, pictures = sum(len(captions_of(root, entry)) for entry in shards), sum(e.pictures for e in shards)
    rows = []
    for turn in range(turns):
        row = {}
        for actors in (1, 2) if turn % 2 else (2, 1):
            forget(dataset)
            started, seen = time.perf_counter(), []

            def hear(done: int, _: int, seen: list = seen) -> None:
                seen.append((time.perf_counter(), done))

            precompute_dataset(dataset, by, actors=actors, progress=hear)
            (first_s, first), (last_s, last) = seen[len(seen) // 4], seen[-1]
            row[actors] = (last_s - first_s) / (last - first) * pictures / captions * 1e3, last_s - started
        rows.append((*row[1], *row[2], row[1][0] / row[2][0]))
        print("1 actor {:.2f} ms a caption ({:.1f} s); 2 actors {:.2f} ms ({:.1f} s); ratio {:.2f}".format(*rows[-1]))
    one, one_s, two, two_s, ratio = (statistics.median(column) for column in zip(*rows, strict=True))
    print(
        f"\n{captions} captions, medians of {turns} turns: 1 actor {one:.2f} ms a caption, {one_s:.1f} s with the start;"
        f" 2 actors {two:.2f} ms, {two_s:.1f} s; ratio {ratio:.2f}; sidecars of {forget(dataset) / 2**20:.1f} MiB\n"
    )


def saving(dataset: DatasetRef, by: Computation, recipe: TrainRecipe, steps: int) -> None:
    """Of a worker with half of the batch and one thread, in CPU time: other processes disturb that less."""
    torch.set_num_threads(1)
    precompute(dataset, by)
    started = time.perf_counter()
    computing = text_encoder(recipe.text_encoder, tokens=recipe.text_tokens)
    load_s = time.perf_counter() - started
    reader = ShardReader(dataset.uri, digest=dataset.digest)
    order = order_of(reader.manifest, "train", recipe)
    sidecars = Sidecars(reader.root, [entry.sha256 for entry in reader.entries], computing, print)
    finding = looking_up(computing, sidecars.find)
    state = build_state(recipe, resolution=dataset.resolution, classes=len(dataset.classes), device="cpu")
    share = recipe.batch_size // 2
    rows = []
    for batch in sidecars.beside(batches(reader, order, share, stop=steps * share, threads=1), order, reader.shards_of):
        dropped = dropped_of(recipe, batch.index)[1]
        spent = [time.thread_time()]
        for encoder in (computing, finding):
            caption_condition(batch.captions, dropped, encoder)
            spent.append(time.thread_time())
        state.encoder = finding
        train_step(state, batch, recipe)
        spent.append(time.thread_time())
        rows.append([end - begin for begin, end in pairwise(spent)])
    (first_computed, first_found, first_step), *rest = rows
    computed, found, step = (statistics.median(column) for column in zip(*rest, strict=True))
    without = step - found + computed
    print(
        f"{share} pictures of a step, medians of {len(rest)}: captions computed {computed * 1e3:.1f} ms, found"
        f" {found * 1e3:.2f} ms; the step {without * 1e3:.0f} ms without sidecars, {step * 1e3:.0f} ms with them:"
        f" {without / step:.2f} times as many images/s while captions are new\nthe first step"
        f" {first_step - first_found + first_computed:.2f} s without,"
        f" {first_step:.2f} s with them; loading the encoder takes {load_s:.2f} s either way"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--part", choices=("cost", "saving", "both"), default="both")
    options = parser.parse_args()
    recipe = PRESETS["emoji-text"]()
    by = Computation(encoder=text_identity(recipe.train.text_encoder, tokens=recipe.train.text_tokens), device="cpu")
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        dataset = shard_dataset("embedded", recipe.shard.model_copy(update={"shard_size": 32}), folder)
        if options.part != "saving":
            with local_ray(Path(folder, "ray"), cpus=4):
                cost(dataset, by, options.turns)
        if options.part != "cost":
            saving(dataset, by, recipe.train, options.steps)


if __name__ == "__main__":
    main()
