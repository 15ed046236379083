"""Shards opened for reading: the index of each, and its bytes from memory, a local file or straight from the storage.

A shard of small pictures that is asked for again is read whole into memory: between two pictures there is then no call
of the system, at which threads hand Python's lock to each other.  What is held is the shards in use, as many as there is
room for: one leaves when it is asked for no more, and never for another one that is in use as well.
"""

import mmap
import os
import weakref
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import numpy as np

from diffusion.data.manifest import ShardEntry
from diffusion.data.shards import DamagedShard, damaged, read_index
from diffusion.store.cache import ShardCache
from diffusion.store.storage import LocalFolder, Storage, open_plain

OPEN_SHARDS = 128  # each holds a file open; a process may have 1,024
INDEX_BYTES = 64 * 2**20  # of all open shards together
WHOLE_BYTES = 256 * 2**20  # of those read whole
SMALL_PICTURE = 16 * 2**10  # bytes of tar for each: larger ones take so long to decode that a read does not matter
_UNUSED = 4  # rounds over the open shards in which one that is held whole is not asked for: it is done with

Read = Callable[[int, int], bytes | memoryview]  # (size, start) -> that many bytes, fewer only at the end of the tar


class OpenShard(NamedTuple):
    """The rows of a shard's index, and its bytes."""

    index: np.ndarray
    read: Read


class OpenShards:
    """The shards used last, of many.  Safe to use from several threads: who still reads from a shard that has left keeps
    its file open.

    Shards of a local folder are read where they are.  Others are read from a verified local copy in `cache`, or, without
    one, piece by piece from the storage.
    """

    def __init__(self, root: Storage, entries: Sequence[ShardEntry], cache: ShardCache | None = None) -> None:
        self.root, self.entries = root, entries
        self.cache = None if isinstance(root, LocalFolder) else cache
        self._open: OrderedDict[int, OpenShard] = OrderedDict()
        self._forgotten: Counter[int] = Counter()
        self._index_bytes = 0
        self._whole: OrderedDict[int, int] = OrderedDict()  # shards held whole, the one used longest ago first -> when
        self._whole_bytes = 0
        self._buffers = _Buffers()
        self._asked = 0  # times, of all shards
        self._lock = Lock()

    def get(self, number: int) -> OpenShard:
        """The shard `number` of `entries`.  Raises DamagedShard where its tar is missing, or its index not as written."""
        while True:
            with self._lock:
                self._asked += 1
                while self._whole and self._asked - next(iter(self._whole.values())) > _UNUSED * len(self._open):
                    self._close(next(iter(self._whole)))
                if shard := self._open.get(number):
                    self._open.move_to_end(number)
                    if number in self._whole:
                        self._whole[number] = self._asked
                        self._whole.move_to_end(number)
                    elif self._hold(number, shard):
                        break
                    return shard
                forgotten = self._forgotten[number]
            entry = self.entries[number]
            shard = OpenShard(read_index(self.root, entry), self._reader(entry))
            with self._lock:
                if self._forgotten[number] != forgotten:  # what we opened may be what was forgotten
                    continue
                self._close(number)  # opened by another thread as well
                self._open[number] = shard
                self._index_bytes += shard.index.nbytes
                while len(self._open) > 1 and (len(self._open) > OPEN_SHARDS or self._index_bytes > INDEX_BYTES):
                    self._close(next(iter(self._open)))
            return shard
        try:
            whole = OpenShard(shard.index, _Whole(self._buffers.filled(shard.read, self.entries[number].bytes)))
        except OSError:  # a bad block: which pictures it hits shows when each is read
            return shard
        with self._lock:
            if self._open.get(number) is shard:
                self._open[number] = whole
        return whole

    def _hold(self, number: int, shard: OpenShard) -> bool:
        """Whether a shard is to be read whole, by who asks: then its room is taken."""
        entry = self.entries[number]
        small = isinstance(shard.read, _File) and entry.bytes <= SMALL_PICTURE * entry.pictures
        if not small or self._whole_bytes + entry.bytes > WHOLE_BYTES:
            return False
        self._whole[number] = self._asked
        self._whole_bytes += entry.bytes
        return True

    def _close(self, number: int) -> None:
        if shard := self._open.pop(number, None):
            self._index_bytes -= shard.index.nbytes
        if self._whole.pop(number, None):
            self._whole_bytes -= self.entries[number].bytes

    def fetch(self, number: int) -> None:
        """Have the local copy of a shard that is not open, where such copies are made.  Raises as ShardCache does."""
        if self.cache is not None and number not in self._open:
            entry = self.entries[number]
            self.cache.path(self.root, entry.tar, entry.sha256, entry.bytes)

    def forget(self, number: int) -> None:
        """Close a shard in which damage was seen and delete its local copy: the next `get` makes everything anew."""
        if self.cache is not None:
            self.cache.drop(self.entries[number].sha256)
        with self._lock:  # the copy is gone by now, so nobody opens it any more
            self._forgotten[number] += 1
            self._close(number)

    def _reader(self, entry: ShardEntry) -> Read:
        try:
            if isinstance(self.root, LocalFolder):
                return _opened(self.root.path(entry.tar))
            if self.cache is not None:
                return self._cached(self.cache, entry)
        except FileNotFoundError as error:
            raise DamagedShard(damaged(self.root, entry.tar, "is missing")) from error
        return self._pieces(entry)

    def _cached(self, cache: ShardCache, entry: ShardEntry) -> Read:
        while True:
            try:
                path = cache.path(self.root, entry.tar, entry.sha256, entry.bytes)
            except ValueError:
                if entry.bytes > cache.max_bytes:
                    raise
                # the stored shard is damaged somewhere: those of its pictures that are not can be told by their own sums
                return self._pieces(entry)
            try:
                return _opened(path)
            except FileNotFoundError:  # it made room for another one before we could open it
                continue

    def _pieces(self, entry: ShardEntry) -> Read:
        return lambda size, start: self.root.read(entry.tar, start, size)


def _opened(path: Path) -> Read:
    """Reads from a local file by calls of the system.  Mapping it into memory would cost less than reading it whole, but
    whoever touches mapped memory that cannot be read - a file cut off, a disk that fails - is killed.
    """
    return _File(open_plain(path, os.O_RDONLY))


class _Whole(NamedTuple):
    """Reads from memory."""

    view: memoryview

    def __call__(self, size: int, start: int) -> memoryview:
        return self.view[start : start + size]


def pieces(read: Read, sizes: Iterable[int], starts: Iterable[int]) -> list[bytes | memoryview]:
    """Several reads, of an open shard.  A call for each would cost as much again as a piece of memory."""
    if isinstance(read, _Whole):
        view = read.view
        return [view[start : start + size] for size, start in zip(sizes, starts, strict=True)]
    return list(map(read, sizes, starts))


class _File:
    """Reads from an open file, which is closed when nobody refers to it any more."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __call__(self, size: int, start: int) -> bytes:
        return os.pread(self.descriptor, size, start)

    def into(self, buffer: np.ndarray) -> int:
        """The beginning of the file into `buffer`, as far as both go.  Returns how many bytes that is."""
        return os.preadv(self.descriptor, [buffer], 0)

    def __del__(self) -> None:
        os.close(self.descriptor)


class _Buffers:
    """Memory for shards that are read whole, used again for the next ones.

    From the heap, where small things lie between, what shards of differing sizes leave is holes; and what the system gives
    anew it clears page by page, which takes longer than reading a file that it has in memory.  Safe to use from several
    threads, and after a fork: memory is a process's own.
    """

    def __init__(self) -> None:
        self.bytes = 0  # used and free
        self._free: defaultdict[int, list[mmap.mmap]] = defaultdict(list)  # by size
        self._lock = Lock()

    def filled(self, file: _File, size: int) -> memoryview:
        """The first `size` bytes of a file, fewer where it ends before, read-only.  When nobody refers to the view, nor to a
        part of it, any more, its memory is used again."""
        buffer = self._taken(_rounded(size))
        used = np.frombuffer(buffer, np.uint8)
        # called wherever the last reference goes, perhaps in here: it may take no lock
        weakref.finalize(used, self._free[len(buffer)].append, buffer).atexit = False
        return memoryview(used)[: file.into(used[:size])].toreadonly()

    def _taken(self, size: int) -> mmap.mmap:
        with self._lock:
            if free := self._free[size]:
                return free.pop()
            for others in self._free.values():
                while others and self.bytes + size > WHOLE_BYTES:
                    self.bytes -= len(others.pop())
            buffer = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if hasattr(mmap, "MADV_HUGEPAGE"):  # pictures are read all over it
                buffer.madvise(mmap.MADV_HUGEPAGE)
            self.bytes += size
            return buffer


def _rounded(size: int) -> int:
    """Up to an eighth more: of so many sizes, shards that are nearly equal have few."""
    step = max(mmap.PAGESIZE, 1 << max(size.bit_length() - 4, 0))
    return -(-size // step) * step
