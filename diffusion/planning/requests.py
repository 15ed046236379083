"""How many requests the code makes of a bucket: each number is that of the function it names, and a test counts them.

Failures are asked again, and are not counted.
"""

import math
from dataclasses import dataclass, fields

from diffusion.store.s3 import PART_BYTES

PAGE = 1_000  # objects in an answer to LIST
_REPORTS = 4  # files, recipe, report and manifest of a dataset
_HEADS = 3  # looks at what the source gave last, before there is anything


@dataclass(frozen=True)
class Requests:
    """Of each kind.  put: with the POSTs that begin and end an object in parts."""

    get: float = 0
    head: float = 0
    put: float = 0
    list: float = 0
    delete: float = 0

    def __add__(self, other: "Requests") -> "Requests":
        return Requests(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __mul__(self, times: float) -> "Requests":
        return Requests(*(getattr(self, f.name) * times for f in fields(self)))

    @property
    def total(self) -> float:
        return sum(getattr(self, f.name) for f in fields(self))

    def price(self, per_1000: float, per_1000_reads: float) -> float:
        """Of all: PUT, POST and LIST at the one price, GET and HEAD at the other; DELETE is free everywhere."""
        return ((self.put + self.list) * per_1000 + (self.get + self.head) * per_1000_reads) / 1_000


def stored(size: float, part: int = PART_BYTES) -> Requests:
    """`S3Prefix.put` of so many bytes: one PUT; of more than a part a POST, the parts, a POST and a HEAD."""
    if size <= part:
        return Requests(put=1)
    return Requests(put=2 + math.ceil(size / part), head=1)


def fetched(size: float, part: int = PART_BYTES) -> Requests:
    """`S3Prefix.fetch`: a ranged GET for each part."""
    return Requests(get=max(1, math.ceil(size / part)))


def listed(objects: float) -> Requests:
    """`S3Prefix.walk`."""
    return Requests(list=max(1, math.ceil(objects / PAGE)))


def source_read(files: int, listings: int) -> Requests:
    """A bucket of single files: listed so often, and each file read once."""
    return listed(files) * listings + Requests(get=files)


def shards_made(
    kept: int, *, chunks: int, chunk_bytes: float, shards: int, shard_bytes: float, index_bytes: float
) -> Requests:
    """`ingest.shard_dataset` into a bucket: chunks of encoded pictures go there, each picture is read by the worker that
    packs its shard, tars and indexes are put and looked at, and the chunks are deleted."""
    waiting = stored(chunk_bytes) * chunks + Requests(get=kept, delete=chunks) + listed(chunks)
    written = (stored(shard_bytes) + stored(index_bytes)) * shards
    checked = Requests(head=2 * shards + 1, get=_HEADS + 2)  # the manifest: whether it is there, and read again
    return waiting + written + checked + Requests(put=_REPORTS + 1)  # and the note of what the source gave


def training_read(
    *, workers: int, nodes: int, shards: int, shard_bytes: float, index_bytes: float, epochs: float, cache_bytes: float
) -> Requests:
    """What the readers of a run ask for: a worker the manifest and each index, a node each tar, once where its copies of all
    fit and once an epoch where they do not (`store.cache`).  With an order that opens all everywhere; see docs/scale.md.
    """
    fits = shards * shard_bytes <= cache_bytes
    passes = 1 if fits else max(1.0, epochs)
    seen = min(1.0, epochs) if epochs < 1 else 1.0
    tars = fetched(shard_bytes) * (nodes * shards * passes * seen)
    indexes = (fetched(index_bytes) * shards * passes * seen + Requests(get=1)) * workers
    return tars + indexes


def checkpoints_copied(files: dict[str, float], times: int) -> Requests:
    """`copies.send` of a checkpoint with these files (name -> bytes), the manifest among them, so often."""
    each = Requests(delete=1)
    for size in files.values():
        each += stored(size)
    return each * times + listed(len(files) * times)
