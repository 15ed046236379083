"""Sidecars: what a frozen encoder makes of the captions of one shard, in a file of the data root that can never be stale.

    precomputed/<digest of what computes, 16 digits>/<sha256 of the shard>.safetensors

The name is a function of the encoder (weights, tokenizer, length), the kind of device and the shard's bytes, and the content
is a function of what the name names: whatever changes is looked for under another name.  Dataset versions that share a shard
share its sidecar.

It is a safetensors file, so anyone can read it.  Its table comes first: `first` (n + 1,), where in `tokens` (m, width) the
embedding of a caption begins; `crc32` (n,) of its bytes; `caption` (n, 32), sha256 of the UTF-8 of each different caption,
ascending.  The header has the table's sha256.  So an embedding is found and checked by reading the table and its own bytes.
"""

import hashlib
import json
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
from diffusion.data.stream import Batch
from diffusion.recipe import Frozen, canonical_json, digest_of
from diffusion.store.storage import LocalFolder, Storage
from diffusion.text import TextEncoder, TextIdentity

_FIRST_READ = 2**16  # bytes: header and table of 1,400 captions
_FIRST_READ_REMOTE = 2**22  # where each read costs a request: embeddings too, mostly all that there are
_OPEN = 64  # sidecars of which a reader keeps the beginning
_FLOAT = np.dtype("<f4")


class DamagedSidecar(ValueError):
    """A sidecar that is not as it was written.  What it has can be computed, so this ends nothing."""


class Computation(Frozen):
    """What must be equal for an embedding to have the same bits, on one model of processor."""

    encoder: TextIdentity
    device: Literal["cpu", "cuda"]

    @property
    def folder(self) -> str:
        """Where its sidecars lie in the data root."""
        return f"precomputed/{digest_of(self)[:16]}"

    def place(self, shard: str) -> str:
        """Where the sidecar of the shard with this sha256 lies in the data root."""
        return f"{self.folder}/{shard}.safetensors"


def computation_of(encoder: TextEncoder) -> Computation:
    """What an encoder computes by."""
    return Computation(encoder=encoder.identity, device=torch.device(encoder.device).type)


class Header(Frozen):
    """What a sidecar says about itself."""

    format: Literal["diffusion-precomputed/1"] = "diffusion-precomputed/1"
    by: Computation
    shard: str
    captions: int
    tokens: int
    table_sha256: str


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
    # by hand: the package's own writer puts the table last, and several facts in any order
    shapes = {"first": ("I64", [count + 1]), "crc32": ("U32", [count]), "caption": ("U8", [count, 32])}
    shapes["tokens"] = ("F32", [total, width])
    ends = [0, *accumulate((8 * (count + 1), 4 * count, 32 * count, 4 * total * width))]
    header: dict = {"__metadata__": {"precomputed": canonical_json(facts).decode()}}
    for (name, (dtype, shape)), start, end in zip(shapes.items(), ends, ends[1:], strict=False):
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    encoded = canonical_json(header)
    encoded += b" " * (-len(encoded) % 8)
    return b"".join((len(encoded).to_bytes(8, "little"), encoded, table, *values))


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
            raise DamagedSidecar(_damaged(self.root, self.name, f"has a damaged embedding, of the caption {caption!r}"))
        return torch.frombuffer(bytearray(data), dtype=torch.float32).view(-1, self.width)


def open_sidecar(root: Storage, by: Computation, shard: str) -> Sidecar | None:
    """The sidecar of the shard with this sha256; None where there is none.  Raises DamagedSidecar."""
    name = by.place(shard)
    try:
        data = root.read(name, 0, _FIRST_READ if isinstance(root, LocalFolder) else _FIRST_READ_REMOTE)
        start = 8 + int.from_bytes(data[:8], "little")
        if len(data) < start:
            raise ValueError("its header is cut off")
        facts = Header.model_validate_json(json.loads(data[8:start])["__metadata__"]["precomputed"])
        if (facts.by, facts.shard) != (by, shard):
            raise ValueError("it is another's")
        count = facts.captions
        end = start + 8 * (count + 1) + 36 * count
        if len(data) < end:
            data += root.read(name, len(data), end - len(data))
        table = data[start:end]
        if hashlib.sha256(table).hexdigest() != facts.table_sha256:
            raise ValueError("its table differs from its sha256")
    except FileNotFoundError:
        return None
    except (ValueError, LookupError, TypeError) as error:
        raise DamagedSidecar(_damaged(root, name, f"cannot be read: {error}")) from error
    first = np.frombuffer(table, "<i8", count + 1)
    crc32 = np.frombuffer(table, "<u4", count, first.nbytes)
    keys = np.frombuffer(table, "S32", count, first.nbytes + crc32.nbytes)
    return Sidecar(root, name, keys, first, crc32, end, by.encoder.width, data)


def _damaged(root: Storage, name: str, what: str) -> str:
    return f"{root.uri}/{name} {what}. Remove it, and `diffusion shard` makes it again; until then it is computed anew"


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
