"""From shards to batches: random access, a bounded cache of decoded pictures, read-ahead.

Every shard's sha256 is compared with the manifest before its first picture is used.  Nothing here remembers how far a
run has come: a position is an argument, so resuming is starting elsewhere.
"""

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffusion.data import manifest
from diffusion.data.images import BadPicture, decode_png
from diffusion.data.manifest import ShardEntry, Split
from diffusion.data.order import Order
from diffusion.data.shards import check_shard, damaged, read_index


class Sample(NamedTuple):
    """One picture: uint8 (H, W, 3), its class index, and its caption ("" where it has none)."""

    key: str
    image: np.ndarray
    label: int
    caption: str


class Batch(NamedTuple):
    """One rank's part of a global batch, b pictures."""

    images: Tensor  # uint8 (b, 3, H, W)
    label: Tensor  # int64 (b,)
    captions: list[str]
    keys: list[str]
    index: Tensor  # int64 (b,): global positions, which key all randomness of a sample


class ShardReader:
    """Random access to one split of a published dataset.  Safe to use from several threads.

    Decoded pictures are kept in memory up to `cache_mib`, the first ones by index: a run passes over all pictures again
    and again, and then keeping a fixed part beats keeping the latest.  Memory is taken as pictures come.
    """

    def __init__(
        self, uri: str | Path, split: Split = "train", *, digest: str | None = None, cache_mib: int = 1024
    ) -> None:
        self.root, self.split = manifest.root_of(uri), split
        self.manifest = manifest.load(uri, digest=digest)
        self.entries = self.manifest.entries(split)
        if not self.entries:
            raise ValueError(f"{uri} has no pictures in split {split!r}: shard again with a larger `shard.holdout`")
        self.counts = self.manifest.counts(split)
        self._first = np.array([0, *accumulate(self.counts)], np.int64)
        self._indexes: list[np.ndarray] = [read_index(self.root, entry) for entry in self.entries]
        self.keys: list[str] = [key.decode() for index in self._indexes for key in index["key"].tolist()]
        self.labels = np.concatenate([index["label"] for index in self._indexes]).astype(np.int64)
        if tuple(len(index) for index in self._indexes) != self.counts:
            raise ValueError(f"{uri}/{manifest.FILE} disagrees with the indexes on the number of pictures")
        side = self.manifest.resolution
        cached = min(len(self.keys), cache_mib * 2**20 // (3 * side * side))
        self._pictures = np.empty((cached, 3, side, side), np.uint8)
        self._captions: list[str] = [""] * cached
        self._filled = np.zeros(cached, bool)
        self._verified = [False] * len(self.entries)
        self._locks = [Lock() for _ in self.entries]

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, i: int) -> Sample:
        """Picture i of the split.  Raises ValueError naming shard, key and command where the shard is damaged."""
        if not 0 <= i < len(self):
            raise IndexError(f"picture {i} of {len(self)}")
        images, captions = self.gather(np.array([i], np.int64))
        return Sample(self.keys[i], images[0].transpose(1, 2, 0).copy(), int(self.labels[i]), captions[0])

    def gather(self, pictures: np.ndarray) -> tuple[np.ndarray, list[str]]:
        """Picture indices (b,) -> uint8 (b, 3, H, W), newly allocated, and b captions."""
        cached = len(self._pictures)
        if cached == len(self.keys) and self._filled[pictures].all():
            return self._pictures[pictures], [self._captions[i] for i in pictures]
        images = np.empty((len(pictures), *self._pictures.shape[1:]), np.uint8)
        captions = []
        for place, i in enumerate(pictures.tolist()):
            if i < cached and self._filled[i]:
                images[place] = self._pictures[i]
                captions.append(self._captions[i])
                continue
            image, caption = self._load(i)
            images[place] = image
            captions.append(caption)
            if i < cached:  # two threads may both do this, with the same bytes; the mark comes last
                self._pictures[i], self._captions[i] = image, caption
                self._filled[i] = True
        return images, captions

    def _load(self, i: int) -> tuple[np.ndarray, str]:
        """Read and decode picture i -> uint8 (3, H, W) and its caption."""
        number = int(np.searchsorted(self._first, i, side="right")) - 1
        entry, index, place = self.entries[number], self._indexes[number], i - int(self._first[number])
        path, row = self.root.path(entry.tar), index[place]
        with self._locks[number]:
            if not self._verified[number]:
                if self.root.size(entry.tar) is None:
                    raise ValueError(damaged(self.root, entry.tar, "is missing"))
                check_shard(self.root, entry, path)
                self._verified[number] = True
        try:
            png, caption = _read(path, (row["image_offset"], row["image_size"]), (row["txt_offset"], row["txt_size"]))
            image = decode_png(png)
        except (OSError, BadPicture) as error:
            raise ValueError(self._bad_sample(entry, row["key"].decode(), str(error))) from error
        if image.shape != (self.manifest.resolution, self.manifest.resolution, 3):
            raise ValueError(self._bad_sample(entry, row["key"].decode(), f"the picture has shape {image.shape}"))
        return image.transpose(2, 0, 1), caption.decode()

    def _bad_sample(self, entry: ShardEntry, key: str, what: str) -> str:
        return damaged(self.root, entry.tar, f"has a damaged sample, key {key} ({what})")


def _read(path: Path, *spans: tuple[int, int]) -> list[bytes]:
    """The bytes of each (offset, size), from one opening of the file."""
    parts = []
    with open(path, "rb", buffering=0) as file:
        for offset, size in spans:
            parts.append(os.pread(file.fileno(), size, offset))
            if len(parts[-1]) != size:
                raise OSError(f"{len(parts[-1])} of {size} bytes at offset {offset}")
    return parts


def read_batch(reader: ShardReader, order: Order, start: int, stop: int) -> Batch:
    """The pictures at global positions [start, stop)."""
    pictures = order.at(start, stop - start)
    images, captions = reader.gather(pictures)
    return Batch(
        images=torch.from_numpy(images),
        label=torch.from_numpy(reader.labels[pictures]),
        captions=captions,
        keys=[reader.keys[i] for i in pictures],
        index=torch.arange(start, stop),
    )


def batches(
    reader: ShardReader,
    order: Order,
    batch_size: int,
    *,
    start: int = 0,
    stop: int | None = None,
    rank: int = 0,
    world: int = 1,
    threads: int = 2,
    ahead: int = 8,
) -> Iterator[Batch]:
    """Rank `rank`'s contiguous part of the global batches of `batch_size` that cover positions [start, stop).

    The last global batch ends at `stop`, so it may be smaller.  `stop=None` never ends.  `ahead` batches are prepared by
    `threads` threads while the caller works; they end when the iterator is exhausted, closed or collected, and an error
    in them is raised here, at the batch it belongs to.  `threads=0` prepares each batch when it is asked for.
    Raises ValueError where a global batch cannot be divided equally among the ranks.
    """
    if batch_size < 1 or not 0 <= rank < world or threads < 0 or ahead < 1:
        raise ValueError(f"batch_size={batch_size}, rank={rank}, world={world}, threads={threads}, ahead={ahead}")
    if start < 0 or (stop is not None and stop < start):
        raise ValueError(f"start={start}, stop={stop}: positions start at 0 and stop comes after start")
    if sum(order.counts) != len(reader):
        raise ValueError(f"the order is over {sum(order.counts)} pictures, the reader has {len(reader)}")
    last = 0 if stop is None else (stop - start) % batch_size
    for size in (batch_size, last):
        if size % world:
            raise ValueError(
                f"a global batch of {size} pictures cannot be divided among {world} workers: choose a batch size"
                " (and a number of pictures to see) that the number of workers divides"
            )
    spans = _spans(batch_size, start, stop, rank, world)
    return _ahead(reader, order, spans, threads, ahead) if threads else _now(reader, order, spans)


def _spans(batch_size: int, start: int, stop: int | None, rank: int, world: int) -> Iterator[tuple[int, int]]:
    """[first, last) positions of the rank's part, batch after batch."""
    while stop is None or start < stop:
        size = batch_size if stop is None else min(batch_size, stop - start)
        yield start + size * rank // world, start + size * (rank + 1) // world
        start += size


def _now(reader: ShardReader, order: Order, spans: Iterator[tuple[int, int]]) -> Iterator[Batch]:
    for span in spans:
        yield read_batch(reader, order, *span)


def _ahead(
    reader: ShardReader, order: Order, spans: Iterator[tuple[int, int]], threads: int, ahead: int
) -> Iterator[Batch]:
    pool = ThreadPoolExecutor(threads, thread_name_prefix="read-ahead")
    waiting: deque[Future[Batch]] = deque()
    try:
        for span in spans:
            waiting.append(pool.submit(read_batch, reader, order, *span))
            if len(waiting) >= ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
