"""A mixture: several datasets read as one, each as often as its weight says.

It is a manifest over the shards of its parts, so it takes no room.  No picture that one part holds out may be trained on by
way of another: training pictures with the key of a held-out one (the same original) or with its bytes (another original
that looks the same at this resolution) are left out, and a picture that two parts hold out is held out once.  For that the
shards with such pictures are written again without them; all others are shared.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import NamedTuple, get_args

import numpy as np

from diffusion.data import manifest
from diffusion.data.datasets import REPORT, Dataset, local_copy, made_by
from diffusion.data.decide import class_names
from diffusion.data.manifest import DUPLICATE, Encoding, Manifest, Part, ShardEntry, Split
from diffusion.data.reading_order import order_of
from diffusion.data.shards import INDEX, PackedSample, put_shard, read_index, write_shard
from diffusion.recipe import TrainRecipe, canonical_json, digest_of
from diffusion.store.publish import temporary
from diffusion.store.storage import Storage

HELD_ELSEWHERE = "held out elsewhere"  # kind of what is left out of training
_AT_ONCE = 16  # shards looked at


def mix(root: Storage, datasets: Sequence[tuple[Dataset, float]]) -> Dataset:
    """Publish the mixture of these datasets with these weights in their data root.

    The order in which they are given does not matter.  Raises ValueError for datasets that cannot be mixed.
    """
    _check(root, datasets)
    datasets = sorted(datasets, key=lambda pair: pair[0].digest)
    classes = class_names(name for dataset, _ in datasets for name in dataset.manifest.classes)
    held = [_Held(root, dataset) for dataset, _ in datasets]
    parts, shares = [], []
    for number, (dataset, weight) in enumerate(datasets):
        labels = tuple(classes.index(name) for name in dataset.manifest.classes)
        share = _Share(
            train=_leaving(root, dataset, "train", held[:number] + held[number + 1 :]),
            holdout=_leaving(root, dataset, "holdout", held[:number]),
        )
        if not share.train.entries:
            raise ValueError(
                f"every training picture of {dataset.digest[:16]} is held out by another of these datasets: leave it out"
            )
        shares.append(share)
        sizes = {split: len(getattr(share, split).entries) for split in get_args(Split)}
        parts.append(Part(dataset=dataset.digest, weight=weight, labels=labels, **sizes))
    first = datasets[0][0].manifest
    aside = sum((Counter(dataset.manifest.set_aside) for dataset, _ in datasets), Counter())
    aside[HELD_ELSEWHERE] += sum(share.train.left_out for share in shares)
    aside[DUPLICATE] += sum(share.holdout.left_out for share in shares)
    mixed = Manifest(
        resolution=first.resolution,
        classes=classes,
        train_counts=_sum(len(classes), parts, [share.train for share in shares]),
        holdout_counts=_sum(len(classes), parts, [share.holdout for share in shares]),
        shards=tuple(entry for split in get_args(Split) for share in shares for entry in getattr(share, split).entries),
        processing=first.processing,
        recipe_digest=digest_of({"mix": [[part.dataset, part.weight] for part in parts]}),
        files=sum(dataset.manifest.files for dataset, _ in datasets),
        set_aside={kind: count for kind, count in sorted(aside.items()) if count},
        parts=tuple(parts),
    )
    order_of(mixed, "train", TrainRecipe())  # refuses weights that cannot be kept
    report = {"published": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")}
    root.put(f"{manifest.place_of(mixed.digest)}/{REPORT}", canonical_json(report))
    return Dataset(manifest.publish(mixed, root), mixed)


class _Pictures(NamedTuple):
    """A split of a dataset as the mixture has it."""

    entries: tuple[ShardEntry, ...]
    counts: tuple[int, ...]  # of the dataset's own classes
    left_out: int


class _Share(NamedTuple):
    train: _Pictures
    holdout: _Pictures


def _leaving(root: Storage, dataset: Dataset, split: Split, held: Sequence["_Held"]) -> _Pictures:
    """A split of a dataset without the pictures that are among `held`."""
    made, entries, out = dataset.manifest, [], Counter()
    look = partial(_without, root, encoding=made.processing.encoding, held=held)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for kept, left_out in pool.map(look, made.entries(split)):
            entries += [kept] if kept else []
            out += left_out
    before = made.train_counts if split == "train" else made.holdout_counts
    return _Pictures(tuple(entries), tuple(n - out[label] for label, n in enumerate(before)), out.total())


def _sum(classes: int, parts: Sequence[Part], pictures: Sequence[_Pictures]) -> tuple[int, ...]:
    """Pictures of each class of the mixture."""
    total = [0] * classes
    for part, share in zip(parts, pictures, strict=True):
        for label, count in zip(part.labels, share.counts, strict=True):
            total[label] += count
    return tuple(total)


def _check(root: Storage, datasets: Sequence[tuple[Dataset, float]]) -> None:
    if len(datasets) < 2:
        raise ValueError("a mixture is of two datasets or more: `diffusion data mix A=3 B=1`")
    first = datasets[0][0]
    digests = [dataset.digest for dataset, _ in datasets]
    for dataset, weight in datasets:
        name, made = dataset.digest[:16], dataset.manifest
        if not 0 < weight < float("inf"):
            raise ValueError(f"{name}={weight:g}: a weight is a number above 0")
        if digests.count(dataset.digest) > 1:
            raise ValueError(f"{name} is given {digests.count(dataset.digest)} times: give it once, with one weight")
        if dataset.root.uri != root.uri:
            raise ValueError(f"{name} lies in {dataset.root.uri}, not in {root.uri}: mix datasets of one data root")
        if made.parts:
            inner = " ".join(f"{part.dataset[:16]}={part.weight:g}" for part in made.parts)
            raise ValueError(f"{name} is a mixture itself: mix what it is made of, {inner}")
        ours = made_by(first.manifest)
        for what, theirs in made_by(made).items():
            if ours[what] != theirs:
                raise ValueError(
                    f"{name} has {what} {theirs}, {first.digest[:16]} has {ours[what]}: shard one of them again with the"
                    " other's recipe"
                )


class _Held:
    """The held-out pictures of one dataset, to recognise them elsewhere.  Memory: some 60 bytes a picture."""

    def __init__(self, root: Storage, dataset: Dataset) -> None:
        self.root, self.entries = root, dataset.manifest.entries("holdout")
        indexes = [read_index(root, entry) for entry in self.entries]
        rows = np.concatenate([np.empty(0, INDEX), *indexes])
        self.keys = np.sort(rows["key"])
        order = np.argsort(_marks(rows), kind="stable")
        self.marks, self.offsets = _marks(rows)[order], rows["image_offset"][order]
        self.shards = np.repeat(np.arange(len(indexes)), [len(index) for index in indexes])[order]

    def has(self, entry: ShardEntry, index: np.ndarray) -> np.ndarray:
        """Which of another shard's pictures are among them, (n,) bool."""
        same = np.isin(index["key"], self.keys)
        for i in np.flatnonzero(~same & np.isin(_marks(index), self.marks)).tolist():
            size = int(index["image_size"][i])
            picture = self.root.read(entry.tar, int(index["image_offset"][i]), size)
            first, last = (np.searchsorted(self.marks, _marks(index[i : i + 1])[0], side) for side in ("left", "right"))
            same[i] = any(
                self.root.read(self.entries[self.shards[j]].tar, int(self.offsets[j]), size) == picture
                for j in range(first, last)
            )
        return same


def _marks(rows: np.ndarray) -> np.ndarray:
    """(n,) uint64, equal where two pictures' bytes are, and hardly ever else."""
    return (rows["image_crc32"].astype(np.uint64) << np.uint64(32)) | rows["image_size"].astype(np.uint64)


def _without(
    root: Storage, entry: ShardEntry, encoding: Encoding, held: Sequence[_Held]
) -> tuple[ShardEntry | None, Counter]:
    """The shard without the pictures that are among `held`, None where none is left; and how many of each label left it."""
    index = read_index(root, entry)
    leave = np.zeros(len(index), bool)
    for pictures in held:
        leave |= pictures.has(entry, index)
    labels = Counter(index["label"][leave].tolist())
    if not leave.any():
        return entry, labels
    if leave.all():
        return None, labels
    with temporary("a shard") as folder, local_copy(root, entry.tar) as tar:
        made = write_shard(folder, entry.split, _samples(tar, index[~leave]), encoding, size=entry.size)
        put_shard(root, folder, made)
    return made, labels


def _samples(tar: Path, rows: np.ndarray) -> Iterator[PackedSample]:
    with open(tar, "rb") as file:

        def read(row: np.void, name: str) -> bytes:
            file.seek(row[f"{name}_offset"])
            return file.read(row[f"{name}_size"])

        for row in rows:
            yield PackedSample(
                row["key"].decode(), int(row["label"]), json.loads(read(row, "json")), read(row, "image")
            )
