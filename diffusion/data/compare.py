"""Two datasets compared, picture by picture.  Shards that both have are equal by their name, and are not read."""

import json
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from diffusion.data.datasets import Dataset, made_by
from diffusion.data.manifest import ShardEntry
from diffusion.data.shards import INDEX, read_index
from diffusion.store.storage import Storage

_SPAN_BYTES = 2**23  # read at once
_PICTURES = 2**14  # whose facts are held at once

_ROW = np.dtype([*INDEX.descr, ("class", "<i4"), ("shard", "<i4"), ("held", "?")])


class Change(NamedTuple):
    """A picture that differs.  `source`: the file it came from."""

    key: str
    source: str
    what: str


class Difference(NamedTuple):
    """From dataset a to dataset b."""

    shared_shards: int
    shared_bytes: int
    added_classes: tuple[str, ...]
    removed_classes: tuple[str, ...]
    facts: dict[str, tuple[str, str]]  # of the whole: name -> in a, in b, where they differ
    added: int
    removed: int
    moved: int  # between training and held out
    changed: int  # in label, captions or other facts
    examples: dict[str, list[Change]]  # added, removed, moved, changed -> the first few, by key


def difference(a: Dataset, b: Dataset, *, few: int = 5) -> Difference:
    """What is different in b.  A picture that lies in a shard of both is the same in both, wherever else a mixture has it.

    Memory: the index of each shard that one of the two has alone.
    """
    mine, theirs = _places(a), _places(b)
    shared = mine.keys() & theirs.keys()
    first = _rows(a, [(entry, labels) for name, (entry, labels) in mine.items() if name not in shared])
    second = _rows(b, [(entry, labels) for name, (entry, labels) in theirs.items() if name not in shared])
    if a.manifest.parts or b.manifest.parts:
        entries = [mine[name][0] for name in shared]
        first, second = (rows._replace(rows=_outside(rows.rows, entries, a.root)) for rows in (first, second))
    _, i, j = np.intersect1d(first.rows["key"], second.rows["key"], return_indices=True)
    gone = np.setdiff1d(np.arange(len(first.rows)), i)
    new = np.setdiff1d(np.arange(len(second.rows)), j)
    moved = first.rows["held"][i] != second.rows["held"][j]
    changed = 0
    told: list[tuple[int, str]] = []
    for number, what in _changed(a, b, first, second, i, j):
        changed += 1
        if len(told) < few:
            told.append((number, what))
    examples = {
        "added": [_told(second, n, f"class {_class(b, second, n)}") for n in new[:few]],
        "removed": [_told(first, n, f"class {_class(a, first, n)}") for n in gone[:few]],
        "moved": [_told(second, n, _moved(second, n)) for n in j[moved][:few]],
        "changed": [_told(second, n, what) for n, what in told],
    }
    return Difference(
        shared_shards=len(shared),
        shared_bytes=sum(mine[name][0].bytes for name in shared),
        added_classes=tuple(name for name in b.manifest.classes if name not in a.manifest.classes),
        removed_classes=tuple(name for name in a.manifest.classes if name not in b.manifest.classes),
        facts=_facts(a, b),
        added=len(new),
        removed=len(gone),
        moved=int(moved.sum()),
        changed=changed,
        examples=examples,
    )


Labels = tuple[int, ...]


def _places(dataset: Dataset) -> dict[tuple, tuple[ShardEntry, Labels]]:
    """What makes a shard's pictures the same ones -> the shard."""
    classes = dataset.manifest.classes
    return {
        (entry.sha256, entry.split, tuple(classes[label] for label in labels)): (entry, labels)
        for entry, labels in dataset.entries()
    }


class _Rows(NamedTuple):
    root: Storage
    entries: list[ShardEntry]
    rows: np.ndarray  # (n,) of _ROW


def _rows(dataset: Dataset, shards: list[tuple[ShardEntry, Labels]]) -> _Rows:
    """The pictures of these shards, sorted by key."""
    root, parts = dataset.root, [np.empty(0, _ROW)]
    for number, (entry, labels) in enumerate(shards):
        index = read_index(root, entry)
        part = np.empty(len(index), _ROW)
        for name in INDEX.names:
            part[name] = index[name]
        part["class"], part["shard"] = np.asarray(labels)[index["label"]], number
        part["held"] = entry.split == "holdout"
        parts.append(part)
    rows = np.concatenate(parts)
    _, first = np.unique(rows["key"], return_index=True)  # parts of a mixture may share pictures
    return _Rows(root, [entry for entry, _ in shards], rows[first])


def _outside(rows: np.ndarray, shared: list[ShardEntry], root: Storage) -> np.ndarray:
    """The rows of those pictures that are in none of the shared shards, whose indexes are read one at a time."""
    for entry in shared if len(rows) else ():
        rows = rows[~np.isin(rows["key"], read_index(root, entry)["key"])]
    return rows


def _changed(
    a: Dataset, b: Dataset, first: _Rows, second: _Rows, i: np.ndarray, j: np.ndarray
) -> Iterator[tuple[int, str]]:
    """(number in second, what changed) of each picture that both have and that is not the same, in the order of j."""
    for start in range(0, len(i), _PICTURES):
        mine, theirs = i[start : start + _PICTURES], j[start : start + _PICTURES]
        facts = zip(_documents(first, mine), _documents(second, theirs), strict=True)
        for m, n, (old, new) in zip(mine.tolist(), theirs.tolist(), facts, strict=True):
            if what := _what(a, b, first.rows[m], second.rows[n], old, new):
                yield n, ", ".join(what)


def _what(a: Dataset, b: Dataset, was: np.void, now: np.void, old: dict, new: dict) -> list[str]:
    """What is different about one picture: its class, its facts, its bytes."""
    names = a.manifest.classes[was["class"]], b.manifest.classes[now["class"]]
    what = [f"class {names[0]} -> {names[1]}"] if names[0] != names[1] else []
    fields = sorted((old.keys() | new.keys()) - {"label"})
    what += [
        f"{name} {json.dumps(old.get(name))} -> {json.dumps(new.get(name))}"
        for name in fields
        if old.get(name) != new.get(name)
    ]
    return [*what, "its bytes"] if was["image_crc32"] != now["image_crc32"] else what


def _documents(found: _Rows, numbers: np.ndarray) -> list[dict]:
    """The json of each of these pictures.  Neighbours in a shard are read at once."""
    documents: dict[int, dict] = {}
    rows = found.rows[numbers]
    for shard in np.unique(rows["shard"]):
        here = np.flatnonzero(rows["shard"] == shard)
        here = here[np.argsort(rows["json_offset"][here])]
        for run in _runs(rows["json_offset"][here], rows["json_size"][here]):
            span = rows[here[run]]
            start, end = int(span["json_offset"][0]), int(span["json_offset"][-1] + span["json_size"][-1])
            data = found.root.read(found.entries[shard].tar, start, end - start)
            for number, offset, size in zip(here[run], span["json_offset"] - start, span["json_size"], strict=True):
                documents[int(number)] = json.loads(data[offset : offset + size])
    return [documents[number] for number in range(len(numbers))]


def _runs(offsets: np.ndarray, sizes: np.ndarray) -> Iterable[slice]:
    """Neighbours that lie within `_SPAN_BYTES`, as slices of the arrays."""
    start = 0
    for end in range(1, len(offsets) + 1):
        if end == len(offsets) or offsets[end] + sizes[end] - offsets[start] > _SPAN_BYTES:
            yield slice(start, end)
            start = end


def _class(dataset: Dataset, found: _Rows, number: int) -> str:
    return dataset.manifest.classes[found.rows["class"][number]]


def _moved(found: _Rows, number: int) -> str:
    return "training -> held out" if found.rows["held"][number] else "held out -> training"


def _told(found: _Rows, number: int, what: str) -> Change:
    (facts,) = _documents(found, np.array([number]))
    return Change(found.rows["key"][number].decode(), facts["source"], what)


def _facts(a: Dataset, b: Dataset) -> dict[str, tuple[str, str]]:
    one, two = made_by(a.manifest), made_by(b.manifest)
    return {name: (one[name], two[name]) for name in one if one[name] != two[name]}
