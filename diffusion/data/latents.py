"""Sidecars of latents: what a frozen codec makes of the pictures of one shard, in a file as in `data.precomputed`.

Its table is `crc32` (n,), the sum of each picture's latents in the order of the shard; the values are `latents`
(n, 2, C, h, w) float32: mean and standard deviation of each, as the network has them.
"""

import hashlib
import zlib
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Literal

import numpy as np
import torch

from diffusion.codec import Codec, CodecIdentity
from diffusion.data.images import to_model
from diffusion.data.precomputed import Computation, DamagedSidecar, computation_of, damaged, opened, start_of
from diffusion.recipe import Frozen
from diffusion.store.storage import LocalFolder, Storage

_FIRST_READ = 2**16  # bytes: header and table of 16,000 pictures
_OPEN = 256  # sidecars of which the table is kept
_PIECE = 2**22  # bytes of a sidecar that is far away: of some hundred pictures, since each read costs a request
_PIECES = 64  # kept
_FLOAT = np.dtype("<f4")

Shape = tuple[int, int, int, int]  # (2, C, h, w)


def shape_of(codec: CodecIdentity, resolution: int) -> Shape:
    """Of what sidecars hold of a square picture.  Raises ValueError for a side that the codec's factor does not divide."""
    side = codec.side(resolution)
    return 2, codec.channels, side, side


def encoded(codec: Codec, images: np.ndarray) -> np.ndarray:
    """What sidecars hold of pictures uint8 (b, H, W, 3): (b, 2, C, h, w) float32, mean and standard deviation."""
    return codec.encode(to_model(torch.from_numpy(images))).cpu().numpy()


class Header(Frozen):
    """What a sidecar of latents says about itself."""

    format: Literal["diffusion-latents/1"] = "diffusion-latents/1"
    by: Computation
    shard: str
    pictures: int
    shape: Shape
    table_sha256: str

    @property
    def table_bytes(self) -> int:
        return 4 * self.pictures


def write_latents(
    path: Path, by: Computation, shard: str, latents: Iterable[np.ndarray], *, pictures: int, shape: Shape
) -> None:
    """Write the file: latents of `shape`, float32, of each of so many pictures.  One is in memory at a time."""
    crc32 = np.zeros(pictures, "<u4")

    def start() -> bytes:
        facts = Header(by=by, shard=shard, pictures=pictures, shape=shape, table_sha256=_sha256(crc32))
        return start_of(facts, {"crc32": ("U32", [pictures]), "latents": ("F32", [pictures, *shape])}) + crc32.tobytes()

    with open(path, "wb") as file:
        file.write(start())  # as long as it will be: a sum has as many digits whatever it is of
        for row, latent in enumerate(latents):
            assert latent.shape == shape
            value = np.ascontiguousarray(latent, _FLOAT).tobytes()
            crc32[row] = zlib.crc32(value)
            file.write(value)
        file.seek(0)
        file.write(start())


def _sha256(crc32: np.ndarray) -> str:
    return hashlib.sha256(crc32.tobytes()).hexdigest()


@dataclass(frozen=True)
class LatentSidecar:
    """The table of one sidecar; latents are read when asked for."""

    root: Storage
    name: str
    crc32: np.ndarray  # (n,) uint32
    start: int  # of the latents, bytes from the start of the file
    shape: Shape

    def read(self, row: int) -> np.ndarray:
        """The latents of picture `row` of the shard, float32 of `shape`.  Raises DamagedSidecar."""
        size = 4 * int(np.prod(self.shape))
        data = self.root.read(self.name, self.start + row * size, size)
        if zlib.crc32(data) != self.crc32[row]:
            raise DamagedSidecar(damaged(self.root, self.name, f"has damaged latents, of picture {row}"))
        return np.frombuffer(data, _FLOAT).reshape(self.shape)


def open_latents(root: Storage, by: Computation, shard: str, shape: Shape) -> LatentSidecar | None:
    """The sidecar of the shard with this sha256; None where there is none.  Raises DamagedSidecar."""
    found = opened(root, by, shard, Header, _FIRST_READ)
    if found is None:
        return None
    if found.said.shape != shape:
        raise DamagedSidecar(damaged(root, by.place(shard), f"has latents of {found.said.shape}, not {shape}"))
    return LatentSidecar(root, by.place(shard), np.frombuffer(found.table, "<u4"), found.start, shape)


class _InPieces:
    """A far storage, read in pieces of _PIECE bytes, of which the last ones are kept."""

    def __init__(self, root: Storage) -> None:
        self.root, self.uri = root, root.uri
        self._piece = lru_cache(_PIECES)(lambda name, number: root.read(name, number * _PIECE, _PIECE))

    def read(self, name: str, start: int, size: int) -> bytes:
        first, last = start // _PIECE, (start + size - 1) // _PIECE
        pieces = []
        for number in range(first, last + 1):
            pieces.append(self._piece(name, number))
            if len(pieces[-1]) < _PIECE:  # the end
                break
        return b"".join(pieces)[start - first * _PIECE :][:size]


class Latents:
    """The latents of the pictures of some shards, from their sidecars; those that none has are to be encoded.

    `find` is safe to use from several threads.  `complete` is for the thread that trains: it computes with one thread, and
    that is a setting of the process.
    """

    def __init__(self, root: Storage, shards: Sequence[str], codec: Codec, resolution: int) -> None:
        """shards: sha256 of each.  Raises ValueError as `shape_of`."""
        self.root = root if isinstance(root, LocalFolder) else _InPieces(root)
        self.shards, self.codec = shards, codec
        self.by, self.shape = computation_of(codec), shape_of(codec.identity, resolution)
        self.news: deque[DamagedSidecar] = deque()  # what nobody has been told yet
        self._open: OrderedDict[int, LatentSidecar | None] = OrderedDict()
        self._unusable: set[int] = set()
        self._lock = Lock()

    def find(self, shard: int, row: int) -> np.ndarray | None:
        """The latents of picture `row` of a shard, by its place; None where they have to be computed."""
        try:
            sidecar = self._sidecar(shard)
            return sidecar and sidecar.read(row)
        except DamagedSidecar as error:
            with self._lock:
                if shard not in self._unusable:
                    self._unusable.add(shard)
                    self.news.append(error)
            return None

    def complete(self, images: np.ndarray, latents: np.ndarray, known: np.ndarray) -> None:
        """Compute the latents (b, 2, C, h, w) that are not known (b,) yet, in their places, of images uint8 (b, H, W, 3)."""
        if not known.all():
            latents[~known] = encoded(self.codec, images[~known])

    def _sidecar(self, shard: int) -> LatentSidecar | None:
        with self._lock:
            if shard in self._unusable:
                return None
            if shard in self._open:
                self._open.move_to_end(shard)
                return self._open[shard]
        found = open_latents(self.root, self.by, self.shards[shard], self.shape)
        with self._lock:
            self._open[shard] = found
            if len(self._open) > _OPEN:
                self._open.popitem(last=False)
        return found
