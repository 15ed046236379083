"""Tables and IDX files for the tests, by independent writers."""

import struct
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

ROWS = [
    {"path": "x/1.png", "caption": "one", "label": "cat", "n": 1},
    {"path": "x/2.png", "caption": "", "label": "dog", "n": 2},
    {"path": "3.png", "caption": "three, with a comma", "label": "cat", "n": 3},
]


def write_table(path: Path, rows: list[dict]) -> Path:
    """A table by pandas."""
    frame = pd.DataFrame(rows)
    if path.suffix == ".jsonl":
        frame.to_json(path, orient="records", lines=True)
    elif path.suffix == ".parquet":
        frame.to_parquet(path, index=False, row_group_size=2)
    else:
        frame.to_csv(path, index=False, sep="\t" if path.suffix == ".tsv" else ",")
    return path


def parquet_of(path: Path, columns: dict, **how) -> Path:
    pq.write_table(pa.table(columns), path, **how)
    return path


def idx(values: np.ndarray) -> bytes:
    return struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape) + values.tobytes()
