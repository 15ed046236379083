"""Shards: plain WebDataset tars anyone can read, with an index of byte offsets beside each.

A sample is four members with one key: `.cls` (class index), `.json` (facts), `.png`, `.txt` (caption).  Time, owner and
mode of every member are fixed, so equal samples give equal bytes.  The index, `NAME.index.json`, lists keys, labels and
the (offset, size) of each member, so any picture is one read away.
"""

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from diffusion.data.manifest import ShardEntry, Split
from diffusion.recipe import canonical_json
from diffusion.store.publish import sha256_file

INDEX_FORMAT = "diffusion-index/1"
MEMBERS = ("cls", "json", "png", "txt")


class PackedSample(NamedTuple):
    """What goes into a shard under one key.  No dots in `key`: WebDataset takes the rest for the extension."""

    key: str
    label: int
    facts: dict
    png: bytes
    caption: str


class Index(NamedTuple):
    """The index of one shard: parallel lists over its samples; `spans[member][i]` is (offset, size) in the tar."""

    keys: list[str]
    labels: list[int]
    spans: dict[str, list[tuple[int, int]]]


def write_shard(path: Path, split: Split, samples: Iterable[PackedSample]) -> ShardEntry:
    """Write `path` (.tar) and its index; the same samples in the same order give the same bytes.

    Raises ValueError for a key with a dot or a slash, a key used twice, or no samples.
    """
    index = Index([], [], {member: [] for member in MEMBERS})
    with open(path, "wb") as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples:
            if not sample.key or set("./") & set(sample.key):
                raise ValueError(f"key {sample.key!r}: a key is not empty and has neither '.' nor '/'")
            index.keys.append(sample.key)
            index.labels.append(sample.label)
            content = {
                "cls": str(sample.label).encode(),
                "json": canonical_json(sample.facts),
                "png": sample.png,
                "txt": sample.caption.encode(),
            }
            for member in MEMBERS:
                index.spans[member].append(_add(tar, f"{sample.key}.{member}", content[member]))
    if not index.keys or len(set(index.keys)) != len(index.keys):
        raise ValueError(f"{path.name}: {len(index.keys)} samples, {len(set(index.keys))} different keys")
    index_path = path.with_suffix(".index.json")
    spans = {member: [list(span) for span in index.spans[member]] for member in MEMBERS}
    document = {"format": INDEX_FORMAT, "shard": path.name, "keys": index.keys, "labels": index.labels, "spans": spans}
    index_path.write_bytes(canonical_json(document) + b"\n")
    return ShardEntry(
        name=path.name,
        split=split,
        pictures=len(index.keys),
        bytes=path.stat().st_size,
        sha256=sha256_file(path),
        index=index_path.name,
        index_sha256=sha256_file(index_path),
    )


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> tuple[int, int]:
    """Add a member; returns (offset, size) of its bytes in the tar."""
    info = tarfile.TarInfo(name)
    info.size, info.mtime, info.mode = len(data), 0, 0o444
    info.uid, info.gid, info.uname, info.gname = 0, 0, "", ""
    tar.addfile(info, io.BytesIO(data))
    blocks = -(-len(data) // tarfile.BLOCKSIZE)
    return tar.offset - blocks * tarfile.BLOCKSIZE, len(data)


def read_index(folder: Path, entry: ShardEntry) -> Index:
    """The index of a shard, checked against its manifest.  Raises ValueError naming the shard and the command."""
    path = folder / entry.index
    if not path.exists() or sha256_file(path) != entry.index_sha256:
        raise ValueError(damaged(folder, entry.index, "is missing or differs from the manifest's sha256"))
    document = json.loads(path.read_bytes())
    spans = {member: [tuple(span) for span in document["spans"][member]] for member in MEMBERS}
    return Index(document["keys"], document["labels"], spans)


def check_shard(folder: Path, entry: ShardEntry) -> None:
    """Read the whole shard and compare its sha256.  Raises ValueError naming the shard and the command."""
    path = folder / entry.name
    if not path.exists():
        raise ValueError(damaged(folder, entry.name, "is missing"))
    if (actual := sha256_file(path)) != entry.sha256:
        raise ValueError(damaged(folder, entry.name, f"has sha256 {actual[:12]}, manifest says {entry.sha256[:12]}"))


def damaged(folder: Path, name: str, what: str) -> str:
    """The message for a file of a published dataset that is not as it was written."""
    return (
        f"{folder / name} {what}. A published shard never changes, so this copy is damaged: remove the folder {folder}"
        " and make it again with `diffusion shard`"
    )
