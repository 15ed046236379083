"""A source of pictures of many shapes, and a dataset of it in aspect buckets."""

from pathlib import Path

import numpy as np

from diffusion.data.images import encode_png
from diffusion.recipe import ShardRecipe

RECIPE = ShardRecipe(resolution=32, shard_size=8, holdout=0.2, bucket_aspect=2.5)
SIZES = ((40, 24), (32, 32), (24, 40))  # (height, width) of its buckets
SHAPES = ((60, 30), (50, 34), (48, 48), (40, 44), (30, 64), (33, 50), (20, 90))  # (height, width) in the source


def picture(i: int, shape: tuple[int, int]) -> np.ndarray:
    """Picture i, uint8 (*shape, 3): a slope with a bar that lies where i says."""
    y, x = np.indices(shape)
    pixels = np.stack([255 * y // shape[0], 255 * x // shape[1], np.full(shape, 37 * i % 256)], axis=2)
    pixels[i % shape[0], :, 2] = 255 - pixels[i % shape[0], :, 2]
    return pixels.astype(np.uint8)


def write(folder: Path, count: int = 70, *, first: int = 0) -> Path:
    """`count` pictures in two classes, each of SHAPES as often."""
    for i in range(first, first + count):
        target = folder / ("lying" if i % 2 else "standing") / f"{i:03d}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(encode_png(picture(i, SHAPES[i % len(SHAPES)])))
    return folder
