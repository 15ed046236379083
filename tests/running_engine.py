"""An engine at work, for the tests: asked, waited for, and what it drew compared."""

import threading
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from diffusion.serving.engine import Engine
from diffusion.serving.job import Job
from diffusion.serving.lineup import Lineup
from diffusion.serving.request import GenerateRequest, resolve
from diffusion.serving.shelf import Shelf
from diffusion.serving.ticket import Ticket
from diffusion.store.bundle_spec import BundleSpec
from diffusion.store.refs import ModelRef
from tests.random_bundle import CLASSES

MIXED = [
    GenerateRequest(label="cat", seed=1, n=3),
    GenerateRequest(label="cat", seed=1, sampler="ddim", steps=7),
    GenerateRequest(label="dog", seed=2, n=2, guidance=1),
    GenerateRequest(seed=3, sampler="dpmpp_2m", steps=4),
    GenerateRequest(label=CLASSES[2], seed=2**32 - 1, sampler="dpmpp_2m", guidance=4.5, n=4),
    GenerateRequest(label="dog", seed=0, steps=2, guidance=0),
    GenerateRequest(label="cat", seed=4, n=3, sampler="ddpm", steps=6),
    GenerateRequest(label="dog", seed=4, n=2, sampler="heun_churn", steps=5),
    GenerateRequest(seed=5, sampler="unipc", steps=6),
]


@contextmanager
def running(engine: Engine):
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()


@contextmanager
def waiting_network(engine: Engine, monkeypatch):
    """A running engine whose network waits for the event: what happens meanwhile happens within one tick."""
    gate, entered, inner = threading.Event(), threading.Event(), engine.denoise

    def gated(*query, **cond):
        entered.set()
        assert gate.wait(30)
        return inner(*query, **cond)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "denoise", gated)
        with running(engine):
            try:
                yield gate, entered
            finally:
                gate.set()


def job_of(engine: Engine, **fields) -> Job:
    return engine.job(resolve(GenerateRequest(**fields), engine.bundle.spec))


def ask(engine: Engine, **fields) -> Ticket:
    return engine.submit(job_of(engine, **fields))


def same(left, right) -> bool:
    return len(left) == len(right) and all(np.array_equal(a, b) for a, b in zip(left, right, strict=True))


@dataclass(frozen=True)
class OfEngines:
    """A shelf's source whose models lie in memory: an engine for each version."""

    engines: dict[str, Engine]

    def spec(self, model: ModelRef) -> BundleSpec:
        return self.engines[model.version].bundle.spec

    def size(self, model: ModelRef) -> int:
        return 4 * self.spec(model).parameters

    def open(self, model: ModelRef) -> Engine:
        return self.engines[model.version]


@contextmanager
def shelved(engine: Engine, model: ModelRef):
    """A shelf that offers this engine alone, running."""
    shelf = Shelf(OfEngines({model.version: engine}))
    try:
        shelf.change(Lineup(models=(model,)))
        yield shelf
    finally:
        shelf.close()
