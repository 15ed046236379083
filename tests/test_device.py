"""training/device.py on a CPU: nothing is copied or put off; a GPU's order of work without one."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion.training.device import one_ahead, sent, sent_ahead
from tests.random_batch import random_batch

CPU = torch.device("cpu")


def test_on_a_cpu_batches_are_what_they_were():
    batches = iter([random_batch(0, 2, side=8, classes=3)])
    assert sent_ahead(batches, CPU) is batches
    batch = next(batches)
    assert sent(batch.images, CPU) is batch.images


@given(st.integers(0, 6))
@settings(deadline=None)
def test_the_next_is_begun_before_one_is_ended_and_none_is_lost(n: int):
    done: list[str] = []

    def begin(item: int) -> str:
        done.append(f"begin {item}")
        return str(item)

    def end(begun: str) -> int:
        done.append(f"end {begun}")
        return int(begun)

    assert list(one_ahead(iter(range(n)), begin, end)) == list(range(n))
    expected = [f"begin {i}" for i in range(min(n, 1))]
    for i in range(n):
        expected += [f"begin {i + 1}"] * (i + 1 < n) + [f"end {i}"]
    assert done == expected
