"""An engine under load: the same bytes as alone, nothing asked for those who left, and no more let in than can be drawn.

`tests.benchmarks.bench_under_load` does the same at length.
"""

import time

import pytest

from diffusion.serving.engine import Engine
from diffusion.serving.ticket import QueueFull, TooBusy
from tests.random_bundle import random_bundle
from tests.random_load import alone, random_jobs, storm_of
from tests.running_engine import ask, job_of, running

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(random_bundle(), slots="auto", queue=40)


def test_requests_of_every_kind_are_the_same_alone_and_under_a_random_load(engine):
    jobs = random_jobs(engine, 30, seed=1, steps=3)
    expected = [alone(engine, job) for job in jobs]
    with running(engine):
        storm = storm_of(engine, jobs, seed=2, leavers=0.5)
        assert engine.load() == {"slots": engine.slots, "drawing": 0, "waiting": 0}
    assert {number: storm.drawn[number] for number in range(len(jobs))} == dict(enumerate(expected))
    assert len(set(storm.ticks)) > 2  # of many sizes
    assert storm.left > 0
    assert storm.late == 0


def test_of_an_overload_only_what_can_be_drawn_soon_is_let_in(engine, monkeypatch):
    """A queue that stands: ten times of what can be drawn is asked for, and nobody waits longer than a drawing takes."""
    monkeypatch.setattr("diffusion.serving.door._STANDS_S", 0.0)
    patience = engine._door.patience
    monkeypatch.setattr(patience, "max_wait_s", 60.0)
    accepted, refused, job = [], [], job_of(engine, label="cat", guidance=1, steps=10, sampler="ddim")
    with running(engine):
        for ticket in [ask(engine, label="cat", guidance=1, steps=10, sampler="ddim") for _ in range(3)]:
            ticket.future.result(60)  # now it knows how long a drawing takes
        capacity = engine.slots / (10 * engine.networks.seconds(engine.slots))  # pictures a second
        for _ in range(120):
            try:
                accepted.append(engine.submit(job))
            except (TooBusy, QueueFull) as error:
                refused.append(error)
            time.sleep(0.1 / capacity)
        assert engine.load()["waiting"] <= 3 * engine.slots
        for ticket in accepted:
            ticket.future.result(60)
    assert len(refused) > len(accepted) > engine.slots
    assert all(error.retry_after_s >= 1 for error in refused)
