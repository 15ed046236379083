"""Every size of picture is asked in batches that were proven for it, and warm."""

import time

import pytest

from diffusion.serving import engine as engine_module
from diffusion.serving.engine import Engine
from diffusion.serving.request import GenerateRequest, resolve
from tests.random_bundle import shaped_bundle
from tests.running_engine import running

pytestmark = pytest.mark.usefixtures("one_thread")


def test_every_size_is_proven_and_warm_before_it_is_asked_for(monkeypatch):
    """At the start, or where that would take long when there is nothing to draw."""
    bundle = shaped_bundle()
    for seconds in (60, 0):
        monkeypatch.setattr(engine_module, "_PROVING_S", seconds)
        engine, rows = Engine(bundle, slots=2), {}
        monkeypatch.setattr(bundle.denoiser, "forward", heard(bundle.denoiser.forward, rows))
        assert not engine.networks.all_proven
        with running(engine):
            deadline = time.monotonic() + 30
            while not engine.networks.all_proven and time.monotonic() < deadline:
                assert seconds == 0
                time.sleep(0.01)
            asked = GenerateRequest(label="cat", seed=1, size="8x24")
            engine.submit(engine.job(resolve(asked, bundle.spec))).future.result(30)
        monkeypatch.undo()
        sizes = set(engine.ladder.sizes)
        assert rows.keys() == {(24, 8), (8, 24)}
        assert all(tried >= sizes for tried in rows.values())


def heard(forward, rows):
    """Notes how many rows of which size are asked."""

    def hearing(x, sigma, label):
        rows.setdefault(tuple(x.shape[2:]), set()).add(len(x))
        return forward(x, sigma, label)

    return hearing
