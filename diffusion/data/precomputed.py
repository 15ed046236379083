"""What is precomputed of a shard: a sidecar, a file of the data root that can never be stale.

    precomputed/<digest of what computes, 16 digits>/<sha256 of the shard>.safetensors

The name is a function of the encoder (weights, settings), the kind of device and the shard's bytes, and the content is a
function of what the name names: whatever changes is looked for under another name.  Dataset versions that share a shard
share its sidecar.

It is a safetensors file, so anyone can read it.  Its first tensors are a table, whose sha256 the header has, and the last
one the values, each with a sum in the table: a value is found and checked by reading the table and its own bytes.
`data.sidecar` has those of captions, `data.latents` those of pictures.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Literal, NamedTuple, Protocol, TypeVar

import torch

from diffusion.codec import Codec, CodecIdentity
from diffusion.recipe import Frozen, canonical_json, digest_of, first_mistake
from diffusion.store.storage import Storage, StorageRefused
from diffusion.text import TextEncoder, TextIdentity

_BYTES = {"I64": 8, "U32": 4, "U8": 1, "F32": 4}  # of safetensors' types


class DamagedSidecar(ValueError):
    """A sidecar that is not as it was written.  What it has can be computed, so this ends nothing."""


class Computation(Frozen):
    """What must be equal for an embedding or a latent to have the same bits, on one model of processor."""

    encoder: TextIdentity | CodecIdentity
    device: Literal["cpu", "cuda"]

    @property
    def folder(self) -> str:
        """Where its sidecars lie in the data root."""
        return f"precomputed/{digest_of(self)[:16]}"

    def place(self, shard: str) -> str:
        """Where the sidecar of the shard with this sha256 lies in the data root."""
        return f"{self.folder}/{shard}.safetensors"


def computation_of(encoder: TextEncoder | Codec) -> Computation:
    """What an encoder computes by."""
    return Computation(encoder=encoder.identity, device=torch.device(encoder.device).type)


class Facts(Protocol):
    """What any sidecar says about itself."""

    by: Computation
    shard: str
    table_sha256: str

    @property
    def table_bytes(self) -> int: ...


Said = TypeVar("Said", bound=Facts)


class Opened(NamedTuple):
    """A sidecar whose table was found to be as written; `said` is its Facts."""

    said: Facts
    table: bytes
    start: int  # of the values, bytes from the start of the file
    beginning: bytes  # of the file, as much as was read at once


def start_of(facts: Frozen, tensors: Mapping[str, tuple[str, Sequence[int]]]) -> bytes:
    """What a sidecar begins with: its facts, and the type and shape of each tensor, which follow in this order.

    By hand: the package's own writer puts the largest types first, and several facts in any order.
    """
    ends = [0, *accumulate(_BYTES[dtype] * math.prod(shape) for dtype, shape in tensors.values())]
    header: dict = {"__metadata__": {"precomputed": canonical_json(facts).decode()}}
    for (name, (dtype, shape)), start, end in zip(tensors.items(), ends, ends[1:], strict=False):
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    encoded = canonical_json(header)
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded


def opened(root: Storage, by: Computation, shard: str, kind: type[Said], first_read: int) -> Opened | None:
    """The sidecar of the shard with this sha256, `first_read` bytes of it at once and the table; None where there is none.

    Raises DamagedSidecar; StorageRefused and StorageUnavailable pass.
    """
    name = by.place(shard)
    try:
        data = root.read(name, 0, first_read)
        start = 8 + int.from_bytes(data[:8], "little")
        if len(data) < start:
            raise ValueError("its header is cut off")
        said = kind.model_validate_json(json.loads(data[8:start])["__metadata__"]["precomputed"])
        if (said.by, said.shard) != (by, shard):
            raise ValueError("it is another's")
        end = start + said.table_bytes
        if len(data) < end:
            data += root.read(name, len(data), end - len(data))
        table = data[start:end]
        if hashlib.sha256(table).hexdigest() != said.table_sha256:
            raise ValueError("its table differs from its sha256")
    except FileNotFoundError:
        return None
    except StorageRefused:  # says nothing about the sidecar
        raise
    except (LookupError, TypeError) as error:
        raise DamagedSidecar(damaged(root, name, "cannot be read: its header is not understood")) from error
    except ValueError as error:
        raise DamagedSidecar(damaged(root, name, f"cannot be read: {first_mistake(error)}")) from error
    return Opened(said, table, end, data)


def damaged(root: Storage, name: str, what: str) -> str:
    """The message for a sidecar that is not as it was written."""
    return f"{root.uri}/{name} {what}. Remove it, and `diffusion shard` makes it again; until then it is computed anew"
