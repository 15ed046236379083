"""Features as they come, in files without a name: the memory they take does not grow with the number of pictures."""

import math
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffusion.store.publish import room_in


def unnamed(folder: Path, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Room for an array in a file that nobody else sees, and that is gone when the array is."""
    if 0 in shape:
        return np.empty(shape, dtype)
    folder.mkdir(parents=True, exist_ok=True)
    with room_in(folder, "the features of pictures"), tempfile.TemporaryFile(dir=folder) as file:
        if hasattr(
            os, "posix_fallocate"
        ):  # a disk that fills up later would end this process by SIGBUS, without a word
            os.posix_fallocate(file.fileno(), 0, math.prod(shape) * dtype.itemsize)
        return np.memmap(file, dtype, "w+", shape=shape)


class Rows:
    """Columns of one row for each picture, from several writers in any order, each part at the place of its own.

    folder: on the disk that has room for them.  parts: (name, number of rows) of each, in order.
    """

    def __init__(self, folder: Path, parts: Iterable[tuple[int, int]]) -> None:
        self.folder, self.total, self.parts = folder, 0, dict[int, slice]()
        for name, rows in parts:
            self.parts[name] = slice(self.total, self.total + rows)
            self.total += rows
        self.columns: dict[str, np.ndarray] = {}

    def put(self, part: int, columns: Mapping[str, np.ndarray]) -> None:
        """columns: (rows of the part, ...) each; of one name always of one shape and type."""
        for name, values in columns.items():
            if name not in self.columns:
                self.columns[name] = unnamed(self.folder, (self.total, *values.shape[1:]), values.dtype)
            self.columns[name][self.parts[part]] = values

    def get(self, name: str) -> Tensor | None:
        """Likewise, or None where no part has the column."""
        return self[name] if name in self.columns else None

    def __getitem__(self, name: str) -> Tensor:
        """All of a column, (rows, ...), when every part is there: read from the file as it is used."""
        return torch.from_numpy(self.columns[name])
