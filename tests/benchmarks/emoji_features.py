"""Features of the embedded emoji at 32 px by EfficientNet-Lite0, kept in a folder: for benchmarks of metrics."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffusion.data.ingest import shard_dataset
from diffusion.data.reader import ShardReader
from diffusion.evaluation.extractors.features import extractor
from diffusion.recipe import ShardRecipe


class EmojiFeatures(NamedTuple):
    """Of the training split, sorted by class."""

    features: Tensor  # (1789, 1280) float32
    labels: Tensor  # (1789,) int64


def emoji_features(folder: Path) -> EmojiFeatures:
    """Computed once for a folder."""
    kept = folder / "features.npz"
    if not kept.exists():
        dataset = shard_dataset("embedded", ShardRecipe(resolution=32), folder)
        reader = ShardReader(dataset.uri, digest=dataset.digest, cache_mib=0)
        order = np.argsort(reader.labels, kind="stable")
        pictures = np.stack([reader.read(int(i)).image for i in order])
        found = extractor("efficientnet-lite0", resolution=96)(torch.from_numpy(pictures))
        np.savez(kept, features=found.numpy(), labels=reader.labels[order])
    with np.load(kept) as arrays:
        return EmojiFeatures(torch.from_numpy(arrays["features"]), torch.from_numpy(arrays["labels"]).long())
