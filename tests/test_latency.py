"""The time of a request on the serving path."""

import time
from dataclasses import replace

import pytest
import torch

from diffusion.serving.engine import Engine
from diffusion.serving.latency import measure
from tests.random_bundle import random_bundle

pytestmark = pytest.mark.usefixtures("one_thread")
PAUSE_S = 0.01


class Paused(torch.nn.Module):
    """A network that takes its time for each row, as a large one does."""

    def __init__(self, inner) -> None:
        super().__init__()
        self.inner, self.rows = inner, 0

    def forward(self, x, sigma, label):
        self.rows += len(x)
        time.sleep(PAUSE_S * len(x))
        return self.inner(x, sigma, label)


def test_a_request_takes_at_least_what_its_network_calls_take_alone_and_with_the_slots_full():
    bundle = random_bundle()
    network = Paused(bundle.denoiser)
    engine = Engine(replace(bundle, denoiser=network), slots=3)
    proven, steps = network.rows, bundle.spec.sampling.steps
    found = measure(engine, requests=3)
    rows = (network.rows - proven) / (1 + 3 + 3)  # of a picture: one to warm up, three alone, three together
    assert rows >= steps
    assert found.alone_p50 <= found.alone_p95
    assert found.alone_p50 >= steps * PAUSE_S
    assert found.full_p95 >= 3 * steps * PAUSE_S
    assert (found.slots, found.device.partition(" ")[0]) == (3, "cpu")
    assert not engine.alive()  # it is left as it was
