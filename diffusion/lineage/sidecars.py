"""A sidecar read wholly: header, table and every value against their sums (`data.precomputed` says what is in one)."""

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np
from zlib_ng.zlib_ng import crc32

from diffusion.recipe import digest_of
from diffusion.store.storage import Storage

_PIECE = 2**23  # bytes read at a time
_MOST_HEADER = 2**20


def wrong_with(root: Storage, name: str, tell: Callable[[int], None]) -> str | None:
    """What is wrong with the sidecar `name` of a data root, in words; None where all is well.  tell: hears of bytes read."""
    try:
        start, said, tensors = _header(root, name)
        *_, last = tensors
        begin, end = (start + place for place in tensors[last]["data_offsets"])
        table = root.read(name, start, begin - start)
        tell(begin)
        if hashlib.sha256(table).hexdigest() != said["table_sha256"]:
            return "its table differs from its sha256"
        if name != f"precomputed/{digest_of(said['by'])[:16]}/{said['shard']}.safetensors":
            return "it is not what its name says"
        if root.size(name) != end:
            return f"it has not the {end:,} bytes that its header says"
        sums = _column(table, tensors, "crc32", "<u4")
        for number, value in enumerate(_values(root, name, begin, _ends(table, tensors, last))):
            tell(len(value))
            if crc32(value) != sums[number]:
                return f"its value {number} differs from its sum"
    except (ValueError, LookupError, TypeError) as error:
        return f"it cannot be read ({type(error).__name__})"
    return None


def _header(root: Storage, name: str) -> tuple[int, dict, dict]:
    """(where the tensors begin, what the sidecar says of itself, the tensors by name in their order)."""
    size = int.from_bytes(root.read(name, 0, 8), "little")
    if not 0 < size <= _MOST_HEADER:
        raise ValueError("its header is no header")
    tensors = json.loads(root.read(name, 8, size))
    said = json.loads(tensors.pop("__metadata__")["precomputed"])
    return 8 + size, said, dict(sorted(tensors.items(), key=lambda item: item[1]["data_offsets"][0]))


def _column(table: bytes, tensors: dict, name: str, kind: str) -> np.ndarray:
    begin, end = tensors[name]["data_offsets"]
    return np.frombuffer(table[begin:end], kind)


def _ends(table: bytes, tensors: dict, last: str) -> list[int]:
    """Where each value begins, in bytes from the first, and where the last one ends."""
    shape = tensors[last]["shape"]
    row = 4 * math.prod(shape[1:])
    if "first" in tensors:  # values of several rows
        return [int(place) * row for place in _column(table, tensors, "first", "<i8")]
    return [place * row for place in range(shape[0] + 1)]


def _values(root: Storage, name: str, begin: int, ends: list[int]) -> Iterator[memoryview]:
    """The values one after the other, read in pieces."""
    piece, at = memoryview(b""), 0
    for start, end in pairwise(ends):
        if end > at + len(piece):
            piece, at = memoryview(root.read(name, begin + start, max(_PIECE, end - start))), start
        if end > at + len(piece):
            raise ValueError("it is cut off")
        yield piece[start - at : end - at]
