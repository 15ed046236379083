"""How many threads compute: where it shows in the bits, one."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums in one order: float32 products and convolutions and float64 factorizations round differently with more threads.

    Many workers with a thread each use a machine as well as one with many threads.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
