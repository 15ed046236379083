"""Small published datasets, put together by hand: any picture in any split of any shard."""

import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from diffusion.data import manifest
from diffusion.data.datasets import REPORT, Dataset
from diffusion.data.images import encode_png
from diffusion.data.manifest import Manifest, Processing, ShardEntry, Split
from diffusion.data.shards import PackedSample, put_shard, write_shard
from diffusion.store.storage import Storage

SIDE = 16


class Made(NamedTuple):
    """A picture: `look` decides its pixels, `original` its key; where they are equal, so are those."""

    look: int
    label: str = "cats"
    split: Split = "train"
    captions: tuple[str, ...] = ()
    original: int | None = None

    @property
    def content(self) -> str:
        return hashlib.sha256(f"{self.look if self.original is None else self.original}".encode()).hexdigest()

    @property
    def key(self) -> str:
        return self.content[:32]

    @property
    def image(self) -> np.ndarray:
        return np.random.default_rng(self.look).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)


def published(
    root: Storage, pictures: Sequence[Made], *, shard_size: int = 4, report: dict | None = None, **changed
) -> Dataset:
    """Publish a dataset of these pictures in `root`.  changed: fields of the manifest."""
    classes = tuple(sorted({picture.label for picture in pictures}))
    shards = []
    for split in ("train", "holdout"):
        members = sorted((picture for picture in pictures if picture.split == split), key=lambda picture: picture.key)
        for start in range(0, len(members), shard_size):
            shards.append(_shard(root, split, classes, members[start : start + shard_size]))
    counts = {split: Counter(p.label for p in pictures if p.split == split) for split in ("train", "holdout")}
    made = Manifest(
        resolution=SIDE,
        classes=classes,
        train_counts=tuple(counts["train"][name] for name in classes),
        holdout_counts=tuple(counts["holdout"][name] for name in classes),
        shards=tuple(shards),
        processing=Processing(background="#ffffff"),
        recipe_digest="ab" * 32,
        files=len(pictures),
        set_aside={},
    ).model_copy(update=changed)
    uri = manifest.publish(made, root)
    if report is not None:
        root.put(f"{manifest.place_of(made.digest)}/{REPORT}", json.dumps(report).encode())
    return Dataset(uri, made)


def _shard(root: Storage, split: Split, classes: tuple[str, ...], members: Sequence[Made]) -> ShardEntry:
    samples = [
        PackedSample(picture.key, classes.index(picture.label), facts(picture), encode_png(picture.image))
        for picture in members
    ]
    with tempfile.TemporaryDirectory() as folder:
        entry = write_shard(Path(folder), split, samples)
        put_shard(root, Path(folder), entry)
    return entry


def facts(picture: Made) -> dict:
    return {
        "source": f"{picture.label}/{picture.look}.png",
        "label": picture.label,
        "captions": [[text, 1.0] for text in picture.captions],
        "content_sha256": picture.content,
        "width": SIDE,
        "height": SIDE,
        "metadata": {},
    }
