"""What aspect buckets keep of what a square cuts off, and what they cost: `python -m tests.benchmarks.bench_buckets`.

Kept: of each picture the share of its pixels within the window that is cut out, in the mean over the pictures; and the
share of the pictures of which more than a tenth is lost.  The pictures are of the shapes in SHAPES, each as often, or those
below --source.

Read: the same pictures sharded as squares and in buckets, epochs of both in turn, by batches that `data.stream` reads
ahead with two threads, decoded anew each time; megapixels a second, and the median over the turns of their ratio.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from diffusion.data.images import encode_jpeg
from diffusion.data.ingest import shard_dataset
from diffusion.data.pictures.buckets import buckets_by, shown, size_for
from diffusion.data.pictures.fit import cropped
from diffusion.data.reader import ShardReader
from diffusion.data.reading_order import order_of
from diffusion.data.stream import batches
from diffusion.recipe import ShardRecipe, TrainRecipe
from diffusion.store.refs import DatasetRef
from tests.photographs import photograph

SHAPES = ((1, 1), (4, 3), (3, 4), (3, 2), (2, 3), (16, 9), (9, 16), (5, 4))  # width : height
LONGER = 720  # side of the pictures that are made
ASPECTS = (1.5, 2.0, 2.5)


def shapes_of(folder: Path) -> list[tuple[int, int]]:
    """(width, height) of the pictures below a folder."""
    found = []
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"):
            with Image.open(path) as image:
                found.append(image.size)
    return found


def kept(shapes: list[tuple[int, int]], recipe: ShardRecipe) -> np.ndarray:
    """Share of each picture that is left."""
    windows = (cropped(height, width, size_for(width, height, recipe)) for width, height in shapes)
    return np.array([h * w / (height * width) for (width, height), (h, w) in zip(shapes, windows, strict=True)])


def made(folder: Path, count: int) -> list[tuple[int, int]]:
    """Write `count` pictures as JPEG.  Returns their (width, height)."""
    shapes = []
    for i in range(count):
        w, h = SHAPES[i % len(SHAPES)]
        width, height = LONGER * w // max(w, h), LONGER * h // max(w, h)
        pixels = photograph(LONGER, i)[:height, :width]
        (folder / f"{i:05d}.jpg").write_bytes(encode_jpeg(np.ascontiguousarray(pixels), 90))
        shapes.append((width, height))
    return shapes


def epoch(ref: DatasetRef, train: TrainRecipe, number: int) -> tuple[int, float]:
    """Pixels of as many whole batches as hold the pictures once, and the seconds that they took."""
    reader = ShardReader(ref.uri, cache_mib=0)
    order, size = order_of(reader.manifest, "train", train), train.batch_size
    per_epoch = -(-len(reader) // size) * size
    began, pixels = time.perf_counter(), 0
    for batch in batches(reader, order, size, start=number * per_epoch, stop=(number + 1) * per_epoch, threads=2):
        pixels += batch.images.shape[0] * batch.images.shape[2] * batch.images.shape[3]
    return pixels, time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, help="folder of pictures to look at; none: made, and read as well")
    parser.add_argument("--pictures", type=int, default=160)
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--turns", type=int, default=7)
    options = parser.parse_args()
    square = ShardRecipe(resolution=options.resolution, holdout=0, shard_size=128, encoding="jpeg")
    recipes = {"square": square} | {
        f"buckets to {aspect:g}": square.model_copy(update={"bucket_aspect": aspect, "bucket_step": 32})
        for aspect in ASPECTS
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "source").mkdir()
        shapes = shapes_of(options.source) if options.source else made(folder / "source", options.pictures)
        print(f"{len(shapes):,} pictures at {options.resolution} pixels")
        for what, recipe in recipes.items():
            share = kept(shapes, recipe)
            sizes = f"  {' '.join(map(shown, buckets_by(recipe)))}"
            print(
                f"  {what:<16} keeps {share.mean():.1%}; of {(share < 0.9).mean():.0%} more than a tenth is lost{sizes}"
            )
        if options.source:
            return
        train = TrainRecipe(batch_size=32)
        both = [shard_dataset(folder / "source", recipes[what], folder / what) for what in ("square", "buckets to 2")]
        rates: list[list[float]] = [[], []]
        for turn in range(options.turns):
            for ref, found in zip(both, rates, strict=True):
                pixels, seconds = epoch(ref, train, turn)
                found.append(pixels / 1e6 / seconds)
        medians = [statistics.median(found) for found in rates]
        ratio = statistics.median(b / a for a, b in zip(*rates, strict=True))
        print(f"read: squares {medians[0]:.0f} megapixels/s, buckets {medians[1]:.0f}: {ratio:.2f} times")


if __name__ == "__main__":
    main()
