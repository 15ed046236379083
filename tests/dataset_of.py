"""A published dataset straight from pictures in memory, without a source or a shard stage, for tests of what reads it."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from diffusion.data import manifest
from diffusion.data.images import encode_png
from diffusion.data.manifest import Encoding, Manifest, Processing
from diffusion.data.shards import PackedSample, put_shard, write_shard
from diffusion.store.refs import DatasetRef
from diffusion.store.storage import Storage


def sample(i: int, side: int, captions: Sequence[tuple[str, float]] = ()) -> PackedSample:
    """Picture i: its pixels, label and key are functions of i."""
    pixels = np.random.default_rng(i).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return PackedSample(f"{i:08x}", i % 3, {"captions": [list(caption) for caption in captions]}, encode_png(pixels))


def publish(
    root: Storage, folder: Path, shards: Sequence[Sequence[PackedSample]], side: int, encoding: Encoding = "png"
) -> DatasetRef:
    """A dataset of training pictures alone, with shards of these samples."""
    entries = []
    for samples in shards:
        entries.append(write_shard(folder, "train", samples, encoding))
        put_shard(root, folder, entries[-1])
    labels = [row.label for samples in shards for row in samples]
    made = Manifest(
        resolution=side,
        classes=("a", "b", "c"),
        train_counts=tuple(labels.count(label) for label in range(3)),
        holdout_counts=(0, 0, 0),
        shards=tuple(entries),
        processing=Processing(background="#ffffff", encoding=encoding),
        recipe_digest="0" * 64,
        files=len(labels),
        set_aside={},
    )
    return made.ref(manifest.publish(made, root))
