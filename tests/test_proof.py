import time

import pytest
import torch

from diffusion.serving.engine import Engine
from diffusion.serving.ticket import EngineStopped, QueueFull
from tests.random_bundle import random_bundle
from tests.running_engine import ask, running, waiting_network

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def engine() -> Engine:
    engine = Engine(random_bundle(), slots=1, queue=1)
    engine.self_test()
    return engine


def until(true) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def damage(engine: Engine) -> None:
    """One bit of one weight: the sign of the largest."""
    with torch.no_grad():
        weight = max((p for p in engine.bundle.denoiser.parameters()), key=lambda p: p.abs().max().item()).view(-1)
        weight[weight.abs().argmax()] *= -1


def test_a_proof_is_renewed_when_it_is_old_and_not_before(engine):
    with running(engine):
        proved = engine.proof.at
        engine.proof.renew(1000)
        assert engine.load()["drawing"] + engine.load()["waiting"] == 0
        engine.proof.renew(0)
        until(lambda: engine.proof.at > proved)
        assert engine.proof.age_s < 30
        assert len(ask(engine, label="cat").future.result(30)) == 1


def test_an_engine_whose_weights_were_hit_is_stopped(engine):
    with running(engine):
        damage(engine)
        ask(engine, label="cat").future.result(30)  # nothing seems wrong
        engine.proof.renew(0)
        until(lambda: not engine.alive())
        assert "it drew" in engine.proof.failure
        with pytest.raises(EngineStopped):
            ask(engine, label="cat")


def test_what_is_no_number_is_a_failure_as_well(engine):
    with running(engine):
        with torch.no_grad():
            next(engine.bundle.denoiser.parameters()).fill_(float("nan"))
        engine.proof.renew(0)
        until(lambda: not engine.alive())
        assert engine.proof.failure is not None


def test_it_is_drawn_once_at_a_time_and_no_queue_is_too_full(engine, monkeypatch):
    with waiting_network(engine, monkeypatch) as (gate, entered):
        tickets = [ask(engine, label="cat", steps=2)]
        assert entered.wait(30)
        tickets.append(ask(engine, label="cat", steps=2))
        with pytest.raises(QueueFull):
            ask(engine, label="cat", steps=2)
        proved = engine.proof.at
        for _ in range(3):
            engine.proof.renew(0)
        until(lambda: engine.load()["waiting"] == 2)
        gate.set()
        until(lambda: engine.proof.at > proved)
        assert all(len(ticket.future.result(30)) == 1 for ticket in tickets)
    assert engine.proof.failure is None
