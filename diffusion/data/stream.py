"""From an order to batches: read-ahead, in threads, of pictures and of the shards they lie in.

Nothing here remembers how far a run has come: a position is an argument, so resuming is starting elsewhere.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffusion.data.bucket_order import AnyOrder, Buckets
from diffusion.data.damage import Damage
from diffusion.data.precomputed import DamagedSidecar
from diffusion.data.reader import ShardReader
from diffusion.data.stored import Captions, first_of
from diffusion.random import Stream, uniform

_FETCHES = 4  # shards fetched at once
_PLANNED = 1024  # parts of batches that are looked at ahead, at most; each step looks at _STEP more
_STEP = 8


class Batch(NamedTuple):
    """One rank's part of a global batch, b pictures."""

    images: Tensor  # uint8 (b, 3, H, W), all of one size, in memory (b, H, W, 3), as they are decoded
    label: Tensor  # int64 (b,)
    captions: list[str]
    keys: list[str]
    index: Tensor  # int64 (b,): global positions, which key all randomness of a sample
    latents: Tensor | None = None  # float32 (b, 2, C, h, w), of a reader with a codec: mean and standard deviation
    known: Tensor | None = None  # bool (b,): the latents that are there yet, whose `images` are not


class _Part(NamedTuple):
    """What a rank reads of a global batch: the pictures at positions from `start`."""

    start: int
    pictures: np.ndarray


def batches(
    reader: ShardReader,
    order: AnyOrder,
    batch_size: int,
    *,
    start: int = 0,
    stop: int | None = None,
    rank: int = 0,
    world: int = 1,
    seed: int = 0,
    threads: int = 2,
    ahead: int = 8,
    ahead_mib: int = 512,
    on_damage: Callable[[Damage | DamagedSidecar], None] | None = None,
) -> Iterator[Batch]:
    """Rank `rank`'s contiguous part of the global batches of `batch_size` that cover positions [start, stop).

    The last global batch ends at `stop`, so it may be smaller.  `stop=None` never ends.  Of several captions of a picture
    one is drawn by their weights, a function of (seed, position).  `ahead` batches are prepared by `threads` threads while
    the caller works, and shards that the reader has to fetch are fetched up to `ahead_mib` MiB before they are needed;
    all threads end when the iterator is exhausted, closed or collected, and an error in them is raised here, at the batch
    it belongs to.  `threads=0` prepares each batch when it is asked for.  `on_damage` is told here, not in a thread, of
    damage that the reader puts up with.  Latents that no sidecar has are computed here as well.
    Raises ValueError where a global batch cannot be divided equally among the ranks, or would not be of one size.
    """
    if batch_size < 1 or not 0 <= rank < world or threads < 0 or ahead < 1 or ahead_mib < 0:
        raise ValueError(
            f"batch_size={batch_size}, rank={rank}, world={world}, threads={threads}, ahead={ahead}, ahead_mib={ahead_mib}"
        )
    if start < 0 or (stop is not None and stop < start):
        raise ValueError(f"start={start}, stop={stop}: positions start at 0 and stop comes after start")
    if len(order) != len(reader):
        raise ValueError(f"the order is over {len(order)} pictures, the reader has {len(reader)}")
    if isinstance(order, Buckets):
        order.check(start, batch_size)
    last = 0 if stop is None else (stop - start) % batch_size
    for size in (batch_size, last):
        if size % world:
            raise ValueError(
                f"a global batch of {size} pictures cannot be divided among {world} workers: choose a batch size"
                " (and a number of pictures to see) that the number of workers divides"
            )
    parts = _parts(order, batch_size, start, stop, rank, world)
    if reader.cache is not None:
        parts = _fetching(reader, parts, min(ahead_mib * 2**20, reader.cache.max_bytes // 2))
    read = _ahead(reader, parts, seed, threads, ahead) if threads else (_read(reader, part, seed) for part in parts)
    return _told(reader, read, on_damage)


def _parts(order: AnyOrder, batch_size: int, start: int, stop: int | None, rank: int, world: int) -> Iterator[_Part]:
    """The rank's part of one global batch after the other."""
    while stop is None or start < stop:
        size = batch_size if stop is None else min(batch_size, stop - start)
        first, end = start + size * rank // world, start + size * (rank + 1) // world
        yield _Part(first, order.at(first, end - first))
        start += size


def _read(reader: ShardReader, part: _Part, seed: int) -> Batch:
    got = reader.gather(part.pictures)
    index = torch.from_numpy(np.arange(part.start, part.start + len(part.pictures)))
    return Batch(
        images=torch.from_numpy(got.images.transpose(0, 3, 1, 2)),
        label=torch.from_numpy(got.label),
        captions=drawn(got.captions, index, seed),
        keys=got.keys,
        index=index,
        latents=None if got.latents is None else torch.from_numpy(got.latents),
        known=None if got.known is None else torch.from_numpy(got.known),
    )


def _complete(reader: ShardReader, batch: Batch) -> Batch:
    """The batch with all of its latents, where it has any."""
    if batch.latents is None:
        return batch
    reader.latents.complete(batch.images.permute(0, 2, 3, 1).numpy(), batch.latents.numpy(), batch.known.numpy())
    return batch._replace(known=None)


def drawn(captions: list[Captions], index: Tensor, seed: int) -> list[str]:
    """One text of each picture, drawn by the weights, the first where all are 0; index (b,): the positions, which with the
    seed decide."""
    if not any(captions):
        return [""] * len(captions)
    texts = [first_of(own) for own in captions]
    if several := [place for place, own in enumerate(captions) if len(own) > 1]:
        for place, u in zip(several, uniform(seed, Stream.WORDS, index[several]).tolist(), strict=True):
            sums = np.cumsum([weight for _, weight in captions[place]])
            if sums[-1] > 0:
                texts[place] = captions[place][int(np.searchsorted(sums, u * sums[-1], side="right"))][0]
    return texts


def _ahead(reader: ShardReader, parts: Iterator[_Part], seed: int, threads: int, ahead: int) -> Iterator[Batch]:
    pool = ThreadPoolExecutor(threads, thread_name_prefix="read-ahead")
    waiting: deque[Future[Batch]] = deque()
    try:
        for part in parts:
            waiting.append(pool.submit(_read, reader, part, seed))
            if len(waiting) >= ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _fetching(reader: ShardReader, parts: Iterator[_Part], limit: int) -> Iterator[_Part]:
    """The same parts, with the shards that later ones need being fetched, in the order of need, up to `limit` bytes before
    their first use (one shard at least).  What a fetch fails of is found again, and told, by who needs the shard.
    """
    pool = ThreadPoolExecutor(_FETCHES, thread_name_prefix="read-ahead")
    planned: deque[tuple[_Part, int]] = deque()  # with the bytes first needed there
    last_use: dict[int, int] = {}  # shard -> number of the last planned part that needs it
    ahead, given, number = 0, 0, 0
    more = True
    try:
        while more or planned:
            for _ in range(_STEP):
                if planned and (ahead >= limit or len(planned) >= _PLANNED):
                    break
                part = next(parts, None)
                if part is None:
                    more = False
                    break
                numbers, places = np.unique(reader.shards_of(part.pictures), return_index=True)
                fresh = [shard for shard in numbers[np.argsort(places)].tolist() if shard not in last_use]
                for shard in fresh:
                    pool.submit(reader.fetch, shard)
                last_use |= dict.fromkeys(numbers.tolist(), number)
                size = sum(reader.entries[shard].bytes for shard in fresh)
                planned.append((part, size))
                ahead, number = ahead + size, number + 1
            if planned:
                part, size = planned.popleft()
                yield part
                ahead -= size
                last_use = {shard: use for shard, use in last_use.items() if use > given}
                given += 1
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _told(
    reader: ShardReader, read: Iterator[Batch], on_damage: Callable[[Damage | DamagedSidecar], None] | None
) -> Iterator[Batch]:
    news = [reader.damage.news, *([reader.latents.news] if reader.latents else [])]
    for batch in read:
        complete = _complete(reader, batch)  # here, not in a thread
        for one in news:
            while on_damage and one:
                on_damage(one.popleft())
        yield complete
