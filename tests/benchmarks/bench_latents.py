"""What precomputed latents cost and save: `python -m tests.benchmarks.bench_latents`.

96 of the embedded pictures at 256 px in shards of 8, and an AutoencoderKL of factor 8 and 3 million random weights, where
Stable Diffusion's has 84: speed does not depend on what weights say.  Cost: making every sidecar on 1 and on 2 actors, in
turns; the rate leaves out the start and the first quarter.  Saving: a network of the demo's shape trains on one thread, on
latents found and on latents encoded on the spot, in turns.  No other library has such sidecars to compare with.
"""

import argparse
import os
import statistics
import tempfile
import time
import zipfile
from pathlib import Path

import torch

from diffusion.adapters.ray_cluster import local_ray
from diffusion.adapters.ray_precompute import precompute_dataset
from diffusion.data import manifest
from diffusion.data.ingest import shard_dataset
from diffusion.data.precompute import precompute
from diffusion.data.precomputed import Computation
from diffusion.data.reader import ShardReader
from diffusion.data.reading_order import order_of
from diffusion.data.stream import batches
from diffusion.recipe import ShardRecipe, TrainRecipe, UNetRecipe
from diffusion.store.codecs import codec_identity, codec_named
from diffusion.store.refs import DatasetRef
from diffusion.training.step import build_state, train_step
from tests.benchmarks.bench_precompute import forget
from tests.small_codec import VARIABLE, saved

PICTURES, SIDE, BATCH = 96, 256, 16
WIDTHS = (32, 64, 64, 128)


def pictures(folder: Path) -> Path:
    """The first of the embedded pictures, as files."""
    archive = Path(manifest.__file__).parent / "embedded" / "noto-emoji-64.zip"
    with zipfile.ZipFile(archive) as source:
        names = [name for name in source.namelist() if name.endswith(".png")][:PICTURES]
        for name in names:
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read(name))
    return folder


def cost(dataset: DatasetRef, by: Computation, turns: int) -> None:
    rates: dict[int, list[float]] = {1: [], 2: []}
    for turn in range(turns):
        for actors in (1, 2) if turn % 2 else (2, 1):
            forget(dataset)
            seen = []

            def hear(done: int, _: int, seen: list = seen) -> None:
                seen.append((time.perf_counter(), done))

            precompute_dataset(dataset, by, actors=actors, progress=hear)
            (first_s, first), (last_s, last) = seen[len(seen) // 4], seen[-1]
            rates[actors].append((last - first) / (last_s - first_s))
    one, two = (statistics.median(values) for values in rates.values())
    count = dataset.images + dataset.holdout
    print(
        f"medians of {turns} turns: 1 actor {one:.1f} pictures/s, 2 actors {two:.1f}; {forget(dataset) / count / 1024:.2f}"
        " KiB a picture"
    )


def saving(dataset: DatasetRef, by: Computation, turns: int, steps: int) -> None:
    torch.set_num_threads(1)
    unet = UNetRecipe(stem=1, attention=(8,))
    shape = {"codec_channels": by.encoder.channels, "codec_factor": by.encoder.factor}
    recipe = TrainRecipe(codec="autoencoder-kl", unet=unet, batch_size=BATCH, sigma_data=1.0, **shape)
    codec = codec_named(by.encoder)
    rates: dict[str, list[float]] = {"found": [], "encoded": []}
    for _ in range(turns):
        for way in rates:
            forget(dataset)
            if way == "found":
                precompute(dataset, by)
            reader = ShardReader(dataset.uri, codec=codec)
            order = order_of(reader.manifest, "train", recipe)
            state = build_state(recipe, resolution=SIDE, classes=len(dataset.classes), device="cpu")
            stream = batches(reader, order, BATCH, stop=(steps + 1) * BATCH, threads=1)
            train_step(state, next(stream), recipe)
            started = time.perf_counter()
            for batch in stream:
                train_step(state, batch, recipe)
            rates[way].append(steps * BATCH / (time.perf_counter() - started))
    found, encoded = (statistics.median(values) for values in rates.values())
    print(
        f"training, one thread, medians of {turns} turns of {steps} steps: {found:.1f} images/s from sidecars,"
        f" {encoded:.2f} encoding on the spot: {found / encoded:.1f} times"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--part", choices=("cost", "saving", "both"), default="both")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        blocks = {kind: (f"{name}Block2D",) * len(WIDTHS) for kind, name in _BLOCKS.items()}
        os.environ[VARIABLE] = str(
            saved(Path(folder, "codec"), block_out_channels=WIDTHS, **blocks)
        )  # before Ray starts
        by = Computation(encoder=codec_identity("autoencoder-kl"), device="cpu")
        source = pictures(Path(folder, "pictures"))
        dataset = shard_dataset(source, ShardRecipe(resolution=SIDE, shard_size=8), Path(folder, "root"))
        if options.part != "saving":
            with local_ray(Path(folder, "ray"), cpus=4):
                cost(dataset, by, options.turns)
        if options.part != "cost":
            saving(dataset, by, options.turns, options.steps)


_BLOCKS = {"down_block_types": "DownEncoder", "up_block_types": "UpDecoder"}

if __name__ == "__main__":
    main()
