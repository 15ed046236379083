"""Sidecars of captions: what a frozen text encoder makes of those of one shard, in a file as in `data.precomputed`.

Its table is `first` (n + 1,), where in `tokens` (m, width) the embedding of a caption begins; `crc32` (n,) of its bytes;
`caption` (n, 32), sha256 of the UTF-8 of each different caption, ascending.
"""

import hashlib
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from diffusion.data.bucket_order import AnyOrder
from diffusion.data.precomputed import Computation, DamagedSidecar, computation_of, damaged, opened, start_of
from diffusion.data.stream import Batch
from diffusion.recipe import Frozen
from diffusion.store.storage import LocalFolder, Storage
from diffusion.text import TextEncoder

_FIRST_READ = 2**16  # bytes: header and table of 1,400 captions
_FIRST_READ_REMOTE = 2**22  # where each read costs a request: embeddings too, mostly all that there are
_OPEN = 64  # sidecars of which a reader keeps the beginning
_FLOAT = np.dtype("<f4")


class Header(Frozen):
    """What a sidecar of captions says about itself."""

    format: Literal["diffusion-precomputed/1"] = "diffusion-precomputed/1"
    by: Computation
    shard: str
    captions: int
    tokens: int
    table_sha256: str

    @property
    def table_bytes(self) -> int:
        return 8 * (self.captions + 1) + 36 * self.captions


def key_of(caption: str) -> bytes:
    """What a caption is found by, 32 bytes."""
    return hashlib.sha256(caption.encode()).digest()


def sidecar_bytes(by: Computation, shard: str, embeddings: Mapping[str, np.ndarray]) -> bytes:
    """The file: embeddings (n, width) float32 by caption.  The order in which they come changes no byte."""
    ordered = sorted((key_of(caption), np.ascontiguousarray(value, _FLOAT)) for caption, value in embeddings.items())
    values = [value.tobytes() for _, value in ordered]
    first = np.array([0, *accumulate(len(value) for _, value in ordered)], "<i8")
    crc32 = np.array([zlib.crc32(value) for value in values], "<u4")
    table = first.tobytes() + crc32.tobytes() + b"".join(key for key, _ in ordered)
    count, total, width = len(ordered), int(first[-1]), by.encoder.width
    facts = Header(by=by, shard=shard, captions=count, tokens=total, table_sha256=hashlib.sha256(table).hexdigest())
    tensors = {"first": ("I64", [count + 1]), "crc32": ("U32", [count]), "caption": ("U8", [count, 32])}
    tensors["tokens"] = ("F32", [total, width])
    return b"".join((start_of(facts, tensors), table, *values))


@dataclass(frozen=True)
class Sidecar:
    """The table of one sidecar; embeddings are read when asked for."""

    root: Storage
    name: str
    keys: np.ndarray  # (n,) S32, ascending
    first: np.ndarray  # (n + 1,) int64
    crc32: np.ndarray  # (n,) uint32
    start: int  # of the embeddings, bytes from the start of the file
    width: int
    beginning: bytes  # of the file, as much as was read at once

    def find(self, caption: str) -> Tensor | None:
        """(tokens, width) float32, or None for a caption that the shard does not have.  Raises DamagedSidecar."""
        key = np.frombuffer(key_of(caption), self.keys.dtype)[0]  # as numpy has it, without zeros at the end
        row = int(np.searchsorted(self.keys, key))
        if row == len(self.keys) or self.keys[row] != key:
            return None
        begin, end = (self.start + int(place) * 4 * self.width for place in self.first[row : row + 2])
        known = end <= len(self.beginning)
        data = self.beginning[begin:end] if known else self.root.read(self.name, begin, end - begin)
        if zlib.crc32(data) != self.crc32[row]:
            raise DamagedSidecar(damaged(self.root, self.name, f"has a damaged embedding, of the caption {caption!r}"))
        return torch.frombuffer(bytearray(data), dtype=torch.float32).view(-1, self.width)


def open_sidecar(root: Storage, by: Computation, shard: str) -> Sidecar | None:
    """The sidecar of the shard with this sha256; None where there is none.  Raises DamagedSidecar."""
    found = opened(root, by, shard, Header, _FIRST_READ if isinstance(root, LocalFolder) else _FIRST_READ_REMOTE)
    if found is None:
        return None
    count, table = found.said.captions, found.table
    first = np.frombuffer(table, "<i8", count + 1)
    crc32 = np.frombuffer(table, "<u4", count, first.nbytes)
    keys = np.frombuffer(table, "S32", count, first.nbytes + crc32.nbytes)
    return Sidecar(root, by.place(shard), keys, first, crc32, found.start, by.encoder.width, found.beginning)


class Sidecars:
    """Looks up captions in the sidecars of the shards at hand.  A caption that none of them has is not found.

    Tables are read when a caption of their shard is first asked for, and some are kept.
    """

    def __init__(
        self,
        root: Storage,
        shards: Sequence[str],
        encoder: TextEncoder,
        on_damage: Callable[[DamagedSidecar], None],
    ) -> None:
        """shards: sha256 of each.  on_damage hears of each damaged sidecar, which is then not used."""
        self.root, self.shards, self.on_damage = root, shards, on_damage
        self.by, self.device = computation_of(encoder), encoder.device
        self._at_hand: tuple[int, ...] = ()
        self._open: OrderedDict[int, Sidecar | None] = OrderedDict()
        self._unusable: set[int] = set()

    def turn_to(self, shards: Iterable[int]) -> None:
        """The shards, by their place, whose captions are asked for next."""
        self._at_hand = tuple(dict.fromkeys(shards))

    def beside(
        self, batches: Iterable[Batch], order: AnyOrder, shards_of: Callable[[np.ndarray], np.ndarray]
    ) -> Iterator[Batch]:
        """The batches, turning to the shards of each before it is given.  shards_of: the reader's, places by picture."""
        for batch in batches:
            self.turn_to(shards_of(order.at(int(batch.index[0]), len(batch.index))).tolist())
            yield batch

    def find(self, caption: str) -> Tensor | None:
        """(tokens, width) float32 on the encoder's device, the bits that it would compute; None where it has to."""
        for number in self._at_hand:
            try:
                sidecar = self._sidecar(number)
                found = sidecar and sidecar.find(caption)
            except DamagedSidecar as error:
                self._unusable.add(number)
                self.on_damage(error)
                continue
            if found is not None:
                return found.to(self.device)
        return None

    def _sidecar(self, number: int) -> Sidecar | None:
        if number in self._unusable:
            return None
        if number not in self._open:
            self._open[number] = open_sidecar(self.root, self.by, self.shards[number])
            if len(self._open) > max(_OPEN, len(self._at_hand)):
                self._open.popitem(last=False)
        self._open.move_to_end(number)
        return self._open[number]
