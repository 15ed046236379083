"""A few pictures of a dataset, evenly spread over its shards, read without reading the rest."""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from math import isqrt
from typing import NamedTuple

import numpy as np

from diffusion.data.datasets import Dataset
from diffusion.data.images import decode_png, grid
from diffusion.data.manifest import ShardEntry, Split
from diffusion.data.shards import read_index
from diffusion.store.storage import Storage

MAX_ROWS = 20  # classes in a sheet where none are asked for: those with the most pictures
_AT_ONCE = 16  # indexes read at a time
_SHOWN_PIXELS = 64  # sides below are enlarged
_NAME = 28  # characters of a class name beside its row


class Shown(NamedTuple):
    """A picture of a dataset: uint8 (H, W, 3), and what is known of it."""

    key: str
    image: np.ndarray
    label: str
    source: str
    captions: list[tuple[str, float]]


class _Place(NamedTuple):
    entry: ShardEntry
    row: np.void


def preview(
    dataset: Dataset, *, labels: Sequence[str] = (), n: int = 8, split: Split = "train"
) -> dict[str, list[Shown]]:
    """`n` pictures of each class, or all where there are fewer: of those in `labels`, else of the MAX_ROWS largest.

    The same for the same dataset.  Raises ValueError for a class that is not there.
    """
    if n < 1:
        raise ValueError(f"n={n}: show at least one picture of each class")
    wanted = {label: min(n, count) for label, count in _wanted(dataset, labels, split).items()}
    root = dataset.root
    places = _places(dataset, root, wanted, split)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return {
            label: list(pool.map(lambda place, label=label: _read(root, place, label), places[label]))
            for label in wanted
        }


def _wanted(dataset: Dataset, labels: Sequence[str], split: Split) -> dict[str, int]:
    """Class -> its pictures in the split."""
    made = dataset.manifest
    counts = dict(zip(made.classes, made.train_counts if split == "train" else made.holdout_counts, strict=True))
    if unknown := [label for label in labels if label not in counts]:
        some = ", ".join(list(counts)[:MAX_ROWS]) + (", ..." if len(counts) > MAX_ROWS else "")
        raise ValueError(f"no class {unknown[0]!r} in dataset {dataset.digest[:16]}; its classes are {some}")
    largest = sorted(counts, key=lambda label: (-counts[label], label))[:MAX_ROWS]
    return {label: counts[label] for label in labels or sorted(largest, key=made.classes.index) if counts[label]}


def _places(dataset: Dataset, root: Storage, wanted: Mapping[str, int], split: Split) -> dict[str, list[_Place]]:
    """Where `wanted[label]` pictures of each class lie.  Shards are visited far apart first, and only until there are
    enough; of the found the first ones of each shard, which are sorted by their content's hash, are taken in turn.
    """
    shards = list(dataset.entries((split,)))
    names = dataset.manifest.classes
    found: dict[str, list[tuple[int, int, _Place]]] = defaultdict(list)  # round, visit, place
    visits = iter(enumerate(_spread(len(shards))))
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        while any(len(found[label]) < count for label, count in wanted.items()):
            some = list(islice(visits, _AT_ONCE))
            if not some:
                break
            indexes = pool.map(lambda visit: read_index(root, shards[visit[1]][0]), some)
            for (visit, number), index in zip(some, indexes, strict=True):
                entry, labels = shards[number]
                seen: dict[str, int] = defaultdict(int)
                for row in index:
                    label = names[labels[row["label"]]]
                    if label in wanted and seen[label] < wanted[label]:
                        found[label].append((seen[label], visit, _Place(entry, row)))
                        seen[label] += 1
    return {
        label: [place for *_, place in sorted(found[label], key=lambda item: item[:2])[:count]]
        for label, count in wanted.items()
    }


def _spread(count: int) -> list[int]:
    """0 .. count-1, so that the first ones lie far apart whatever their number: by their binary digits reversed."""
    digits = max(1, (count - 1).bit_length())
    return sorted(range(count), key=lambda i: f"{i:0{digits}b}"[::-1])


def _read(root: Storage, place: _Place, label: str) -> Shown:
    entry, row = place
    facts = json.loads(root.read(entry.tar, int(row["json_offset"]), int(row["json_size"])))
    image = decode_png(root.read(entry.tar, int(row["image_offset"]), int(row["image_size"])))
    return Shown(
        row["key"].decode(), image, label, facts["source"], [(text, weight) for text, weight in facts["captions"]]
    )


def sheet(rows: Mapping[str, Iterable[np.ndarray]]) -> np.ndarray:
    """Name -> pictures uint8 (h, w, 3), as one uint8 (H, W, 3): a row each, the name at its left.  Small pictures are shown
    a whole number of times as large, all as many."""
    lists = [list(pictures) for pictures in rows.values()]
    largest = max(picture.shape[0] * picture.shape[1] for pictures in lists for picture in pictures)
    times = max(1, _SHOWN_PIXELS // isqrt(largest))
    lists = [[picture.repeat(times, axis=0).repeat(times, axis=1) for picture in pictures] for pictures in lists]
    columns = max(map(len, lists))
    white = np.full_like(next(picture for pictures in lists for picture in pictures), 255)
    cells = [picture for pictures in lists for picture in [*pictures, *[white] * (columns - len(pictures))]]
    return grid(cells, columns, [name if len(name) <= _NAME else f"{name[: _NAME - 1]}…" for name in rows])
