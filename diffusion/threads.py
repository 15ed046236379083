"""How many threads compute: where it shows in the bits, one.  And how much one that is not urgent leaves to others."""

import threading
import time
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


_pace = threading.local()


@contextmanager
def resting(times: float) -> Iterator[None]:
    """In this thread `rest(seconds)` sleeps so many times as long as that, where it sleeps not at all otherwise."""
    _pace.times = times
    try:
        yield
    finally:
        _pace.times = 0.0


def rest(seconds: float) -> None:
    """After work that took so long, and that nobody waits for: leave the processors, and Python's lock, to others."""
    if times := getattr(_pace, "times", 0.0):
        time.sleep(times * seconds)
