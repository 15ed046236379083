"""Files of tensors that several processes write and read at once, each its own rows: nobody ever holds a whole tensor.

The bytes are those of `safetensors.torch.save_file`, so that whoever reads one knows nothing of how it was written.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from math import prod
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from diffusion.training.shards import Rows

_BYTES = 4  # of a float32, which all numbers of a state are


def allocate(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Make the file of float32 tensors of these shapes, with room for their numbers."""
    head, _, size = _layout(shapes)
    with open(path, "xb") as file:
        file.write(head)
        os.posix_fallocate(file.fileno(), 0, max(size, 1))  # a full disk shows here


def write_rows(path: Path, tensors: Mapping[str, Tensor], rows: Mapping[str, Rows]) -> None:
    """Put tensors into a file that `allocate` made, and flush them: of each the rows that it is."""
    _, starts, _ = _layout({name: where.shape for name, where in rows.items()})
    with open(path, "r+b") as file:
        for name, where in rows.items():
            if where.count:
                assert tensors[name].dtype == torch.float32
                file.seek(starts[name] + _BYTES * where.start * prod(where.shape[1:]))
                file.write(tensors[name].detach().cpu().contiguous().numpy())
        file.flush()
        os.fsync(file.fileno())


def read_rows(path: Path, rows: Callable[[str, Sequence[int]], Rows]) -> dict[str, Tensor]:
    """The tensors of a file, of each the rows that `rows` says by its name and shape; a single number always."""

    def read(file: safe_open, name: str) -> Tensor:
        shape = file.get_slice(name).get_shape()
        where = rows(name, shape)
        if not shape:
            return file.get_tensor(name)
        return where.of(file.get_slice(name)) if where.count else torch.empty(0, *shape[1:])

    with safe_open(path, "pt") as file:
        return {name: read(file, name) for name in file.keys()}  # noqa: SIM118  (it is no dict)


def _layout(shapes: Mapping[str, tuple[int, ...]]) -> tuple[bytes, dict[str, int], int]:
    """The head of a file, where each tensor starts, and the size of all: by name, as of one type they come."""
    names = sorted(shapes)
    ends = [0, *accumulate(_BYTES * prod(shapes[name]) for name in names)]
    header = {
        name: {"dtype": "F32", "shape": list(shapes[name]), "data_offsets": [start, end]}
        for name, start, end in zip(names, ends, ends[1:], strict=False)
    }
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    head = len(encoded).to_bytes(8, "little") + encoded
    return head, {name: len(head) + start for name, start in zip(names, ends, strict=False)}, len(head) + ends[-1]
