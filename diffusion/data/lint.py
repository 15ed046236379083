"""A published dataset looked at wholly: every byte, member, label and picture of every shard.

The tars are read as tars, by Python's own module, and compared with the index beside them, so a mistake in either shows.
"""

import hashlib
import json
import tarfile
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
from zlib_ng.zlib_ng import crc32

from diffusion.data import manifest, quarantine, versions
from diffusion.data.datasets import Dataset, local_copy
from diffusion.data.manifest import ShardEntry, Split
from diffusion.data.pictures.buckets import Size
from diffusion.data.pictures.decode import BadPicture, decode_into
from diffusion.data.quarantine import DamagedQuarantine
from diffusion.data.shards import EXTENSION, INDEX, parse_index
from diffusion.store.publish import sha256_file, temporary
from diffusion.store.storage import Storage

_MEMBERS = ("cls", "json", "image", "txt")


class Finding(NamedTuple):
    """Something in a dataset that is not as it was written.  `key`: of the sample, "" for the whole of `place`."""

    place: str
    key: str
    what: str


class _Seen(NamedTuple):
    findings: list[Finding]
    keys: np.ndarray  # (n,) S32
    labels: Counter  # class index of the dataset -> pictures


def lint(dataset: Dataset, *, threads: int = 4, progress: Callable[[int, int], None] | None = None) -> list[Finding]:
    """Everything that is wrong with a dataset, in the order of its shards; an empty list where all is well.

    progress: called with the pictures looked at, and all.  Memory: `threads` pictures and 32 bytes a picture.
    """
    root, findings, done = dataset.root, [], 0
    keys: list[np.ndarray] = []
    shards = list(dataset.entries())
    found = {split: Counter() for split in ("train", "holdout")}
    with ThreadPoolExecutor(threads) as pool:
        looks = pool.map(lambda shard: _look(dataset, root, *shard), shards)
        for (entry, _), seen in zip(shards, looks, strict=True):
            findings += seen.findings
            keys.append(seen.keys)
            found[entry.split] += seen.labels
            done += entry.pictures
            if progress:
                progress(done, dataset.manifest.images + dataset.manifest.holdout)
    findings += _twice(shards, keys, dataset)
    if not any(finding.key == "" for finding in findings):  # a shard that is lost would make every count differ
        findings += _miscounted(dataset, found)
    return [*findings, *beside(dataset)]


def beside(dataset: Dataset) -> Iterator[Finding]:
    """What the next version goes on from, and what was set aside: no part of the dataset's identity, so it may be missing,
    but not damaged."""
    place, made = manifest.place_of(dataset.digest), dataset.manifest
    if dataset.root.size(f"{quarantine.place_of(dataset.digest)}/{quarantine.REASONS}") is not None:
        yield from _set_aside(dataset)
    if dataset.root.size(f"{place}/{versions.FILES}") is not None:
        with temporary("the list of a dataset's files") as scratch:
            try:
                deque(versions.read_files(dataset.root, made, scratch), maxlen=0)
            except ValueError as error:
                yield Finding(f"{place}/{versions.FILES}", "", str(error))
    if dataset.root.size(f"{place}/{versions.RECIPE}") is not None:
        try:
            versions.recipe_of(dataset.root, made)
        except ValueError as error:
            yield Finding(f"{place}/{versions.RECIPE}", "", str(error))


def _set_aside(dataset: Dataset) -> Iterator[Finding]:
    """The list of the files set aside, and each original."""
    reasons, counts = f"{quarantine.place_of(dataset.digest)}/{quarantine.REASONS}", Counter()
    try:
        for file in quarantine.entries(dataset.root, dataset.digest):
            counts[file.kind] += 1
            try:
                _ = file.place and quarantine.original(dataset.root, file)
            except DamagedQuarantine as error:
                yield Finding(file.tar, "", f"{file.name}: {error}")
    except DamagedQuarantine as error:
        yield Finding(reasons, "", str(error))
        return
    if counts != (said := dataset.manifest.set_aside):
        yield Finding(reasons, "", f"lists {dict(sorted(counts.items()))}, the manifest says {said}")


def _look(dataset: Dataset, root: Storage, entry: ShardEntry, labels: tuple[int, ...]) -> _Seen:
    """One shard, wholly."""
    nothing = np.empty(0, INDEX["key"])
    index, wrong = _index(root, entry)
    findings = [Finding(entry.index, "", wrong)] if wrong else []
    try:
        with local_copy(root, entry.tar) as path:
            if (actual := sha256_file(path)) != entry.sha256:
                findings.append(Finding(entry.tar, "", f"has sha256 {actual[:12]}, as its name does not say"))
            if (size := path.stat().st_size) != entry.bytes:
                findings.append(Finding(entry.tar, "", f"has {size:,} bytes instead of {entry.bytes:,}"))
            samples = _samples(path)
            if index is None:
                return _Seen(findings, nothing, Counter())
            counts: Counter = Counter()
            for place, (key, members) in enumerate(samples):
                row = index[place] if place < len(index) else None
                for what in _sample(dataset, entry, labels, key, members, row, path):
                    findings.append(Finding(entry.tar, key, what))
                if row is not None and 0 <= row["label"] < len(labels):
                    counts[labels[row["label"]]] += 1
    except FileNotFoundError:
        findings.append(Finding(entry.tar, "", "is missing"))
        return _Seen(findings, nothing, Counter())
    except tarfile.TarError as error:
        findings.append(Finding(entry.tar, "", f"is no tar that can be read ({error})"))
        return _Seen(findings, nothing, Counter())
    if not len(samples) == len(index) == entry.pictures:
        told = f"has {len(samples)} samples, its index {len(index)}, the manifest says {entry.pictures}"
        findings.append(Finding(entry.tar, "", told))
    return _Seen(findings, index["key"], counts)


def _index(root: Storage, entry: ShardEntry) -> tuple[np.ndarray | None, str]:
    """The index, or why there is none to go by."""
    try:
        data = root.read(entry.index)
    except FileNotFoundError:
        return None, "is missing"
    if hashlib.sha256(data).hexdigest() != entry.index_sha256:
        return None, "differs from the manifest's sha256"
    index = parse_index(data, entry.pictures)
    return index, f"is no index of {entry.pictures} pictures" if index is None else ""


def _samples(path: Path) -> list[tuple[str, dict[str, tuple[int, int]]]]:
    """(key, extension -> (offset, size) of the member) of each sample of a tar, in its order."""
    with tarfile.open(path, "r:") as tar:
        members = [(*member.name.partition(".")[::2], (member.offset_data, member.size)) for member in tar]
    return [(key, {name: span for _, name, span in group}) for key, group in groupby(members, lambda member: member[0])]


def _sample(
    dataset: Dataset,
    entry: ShardEntry,
    labels: tuple[int, ...],
    key: str,
    members: dict[str, tuple[int, int]],
    row: np.void | None,
    path: Path,
) -> Iterator[str]:
    """What is wrong with one sample."""
    extension = EXTENSION[dataset.manifest.processing.encoding]
    spans = {"image" if name == extension else name: span for name, span in members.items()}
    if set(spans) != set(_MEMBERS):
        yield f"has the members {', '.join(sorted(members))}, not cls, json, {extension}, txt"
        return
    if row is None:
        return  # the shard's numbers of samples are told as a whole
    if row["key"].decode() != key:
        yield f"stands where the index has {row['key'].decode()}"
        return
    for name in ("image", "json", "txt"):
        if spans[name] != (row[f"{name}_offset"], row[f"{name}_size"]):
            yield f"{name} lies elsewhere than the index says"
            return
    with open(path, "rb") as file:

        def read(name: str) -> bytes:
            file.seek(spans[name][0])
            return file.read(spans[name][1])

        data = {name: read(name) for name in _MEMBERS}
    if crc32(data["image"]) != row["image_crc32"]:
        yield "the picture differs from the index's checksum"
    if data["cls"] != str(row["label"]).encode():
        yield f"cls says {data['cls'][:20]!r}, the index {row['label']}"
    if not 0 <= row["label"] < len(labels):
        yield f"label {row['label']} is none of {len(labels)} classes"
        return
    yield from _facts(data, key, dataset.manifest.classes[labels[row["label"]]], int(row["captions"]))
    yield from _picture(data["image"], dataset.manifest.size_of(entry))


def _facts(data: dict[str, bytes], key: str, label: str, captions: int) -> Iterator[str]:
    """What is wrong with the facts of a sample, beside its label's name and its number of captions in the index."""
    try:
        facts = json.loads(data["json"])
        texts, content, named = facts["captions"], facts["content_sha256"], facts["label"]
        first = texts[0][0] if texts else ""
    except (ValueError, KeyError, TypeError, IndexError) as error:
        yield f"its json cannot be used ({type(error).__name__}: {error})"
        return
    if not content.startswith(key):
        yield f"its content is {content[:32]}, as its key does not say"
    if named != label:
        yield f"is of class {label!r} by its index and {named!r} by its json"
    if len(texts) != captions or data["txt"] != first.encode():
        yield "its captions differ between txt, json and index"


def _picture(data: bytes, size: Size) -> Iterator[str]:
    try:
        decode_into(data, np.empty((*size, 3), np.uint8))
    except BadPicture as error:
        yield f"the picture cannot be read ({error})"


def _twice(
    shards: list[tuple[ShardEntry, tuple[int, ...]]], keys: list[np.ndarray], dataset: Dataset
) -> Iterator[Finding]:
    """Keys that come twice.  Two parts of a mixture may share training pictures; nothing else may share any."""
    sizes = [len(found) for found in keys]
    everything = np.concatenate([np.empty(0, INDEX["key"]), *keys])
    order = np.argsort(everything, kind="stable")
    key, place = everything[order], np.repeat(np.arange(len(shards)), sizes)[order]
    held = np.array([entry.split == "holdout" for entry, _ in shards], bool)[place]
    part = np.array(_parts(dataset, shards), np.int64)[place]
    # neighbours of equal key; in one part, or one of the two held out.  Parts come in order, held-out shards last.
    same = key[1:] == key[:-1]
    wrong = np.flatnonzero(same & ((part[1:] == part[:-1]) | held[1:] | held[:-1]))
    for i in wrong.tolist():
        first, again = (shards[place[j]][0] for j in (i, i + 1))
        yield Finding(first.tar, key[i].decode(), f"comes again in {again.tar} ({first.split} and {again.split})")


def _parts(dataset: Dataset, shards: list[tuple[ShardEntry, tuple[int, ...]]]) -> list[int]:
    """The number of the part that each shard belongs to; all 0 where there are no parts."""
    if not dataset.manifest.parts:
        return [0] * len(shards)
    splits: tuple[Split, ...] = ("train", "holdout")
    return [n for split in splits for n, part in enumerate(dataset.manifest.parts) for _ in range(getattr(part, split))]


def _miscounted(dataset: Dataset, found: dict[str, Counter]) -> Iterator[Finding]:
    said = {"train": dataset.manifest.train_counts, "holdout": dataset.manifest.holdout_counts}
    for split, counts in said.items():
        for label, (name, count) in enumerate(zip(dataset.manifest.classes, counts, strict=True)):
            if found[split][label] != count:
                what = f"class {name!r} has {found[split][label]} pictures in split {split}, the manifest says {count}"
                yield Finding("manifest.json", "", what)
