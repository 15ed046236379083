"""The engine at work: slots, cancelling, overload, failures, its life.  What it draws is test_engine_pictures."""

import threading
import time
from concurrent.futures import CancelledError
from dataclasses import replace

import pytest
import torch

from diffusion.sampler import SAMPLERS, Sampler, evaluations
from diffusion.serving.engine import Engine
from diffusion.serving.request import GenerateRequest, RequestError, resolve
from diffusion.serving.ticket import DeadlineExceeded, DrawingFailed, EngineStopped, QueueFull, TooBusy
from tests.random_bundle import random_bundle
from tests.running_engine import MIXED, ask, job_of, running, same, waiting_network

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def quick() -> Engine:
    return Engine(random_bundle(), slots=4, queue=6)


class Wrapped(torch.nn.Module):
    """The denoiser of a bundle with something happening to its answers."""

    def __init__(self, inner, change) -> None:
        super().__init__()
        self.inner, self.change = inner, change

    def forward(self, x, sigma, label):
        return self.change(self.inner(x, sigma, label), label)


def wrapped_engine(change, **options) -> Engine:
    bundle = random_bundle()
    return Engine(replace(bundle, denoiser=Wrapped(bundle.denoiser, change)), **options)


# ---- filling slots ----------------------------------------------------------------------------------------------


def test_slots_are_filled_until_the_last_wave(quick, monkeypatch):
    rows, tick = [], quick.tick
    monkeypatch.setattr(quick, "tick", lambda: rows.append(tick()))
    requests = [GenerateRequest(label="cat", guidance=1, n=3, steps=3, seed=i) for i in range(4)]
    quick.generate(requests)
    waves = 12 // quick.slots
    assert rows == [quick.slots] * (waves * evaluations("heun", 3))


def test_slots_of_its_own_choice_fill_no_more_than_the_call_they_were_chosen_for(quick, monkeypatch):
    """Guided pictures ask for two rows, others for one; what is drawn is the same."""
    engine, rows = Engine(random_bundle(), slots="auto"), []
    assert engine.slots == engine.rows == max(8, engine.ladder.knee)
    tick = engine.tick
    monkeypatch.setattr(engine, "tick", lambda: rows.append(tick()))
    for ours, theirs in zip(engine.generate(MIXED), quick.generate(MIXED), strict=True):
        assert same(ours, theirs)
    assert max(rows) == engine.rows
    assert sum(rows) == sum(r.n * evaluations(r.sampler or "heun", r.steps or 5) * guided(r) for r in MIXED)


def guided(request: GenerateRequest) -> int:
    return resolve(request, random_bundle().spec).guided + 1


def test_progress_counts_every_evaluation_once(quick):
    heard = []
    quick.generate(MIXED, progress=lambda done, total: heard.append((done, total)))
    total = sum(r.n * evaluations(r.sampler or "heun", r.steps or 5) for r in MIXED)
    assert heard[-1] == (total, total)
    assert heard == sorted(heard)
    assert len(heard) > 5


def test_a_ticket_tells_its_own_progress(quick, monkeypatch):
    with waiting_network(quick, monkeypatch) as (gate, entered):
        ticket = ask(quick, label="cat", n=2, steps=3)
        assert entered.wait(10)
        assert ticket.progress == (0, 10)
        gate.set()
        ticket.future.result(30)
    assert ticket.progress == (10, 10)


# ---- cancel, overload, deadline ---------------------------------------------------------------------------------


def test_cancel_frees_the_slots_at_the_next_tick_and_harms_nobody(quick, monkeypatch):
    expected = quick.generate([GenerateRequest(label="dog", seed=5)])[0]
    with waiting_network(quick, monkeypatch) as (gate, entered):
        kept = ask(quick, label="dog", seed=5)
        assert entered.wait(10)
        long = ask(quick, label="cat", n=3, steps=900)
        waiting = ask(quick, label="cat", n=4, steps=2)
        gate.set()
        assert same(kept.future.result(30), expected)
        assert long.cancel()
        waiting.future.result(30)  # would take far longer behind 900 steps
        with pytest.raises(CancelledError):
            long.future.result(0)
        deadline = time.monotonic() + 10
        while quick.load()["drawing"] and time.monotonic() < deadline:
            time.sleep(0.01)
        assert quick.load() == {"slots": 4, "drawing": 0, "waiting": 0}
    assert not kept.cancel()


def test_cancelled_while_waiting_never_takes_a_slot(quick, monkeypatch):
    with waiting_network(quick, monkeypatch) as (gate, entered):
        first = ask(quick, label="cat", n=4)
        assert entered.wait(10)
        second = ask(quick, label="cat", n=6)
        second.cancel()
        third = ask(quick, label="cat", n=6)  # the queue of 6 has room again at once
        gate.set()
        first.future.result(30)
        third.future.result(30)
    assert second.started == 0


def test_overload_is_refused_with_the_time_to_wait(quick, monkeypatch):
    with waiting_network(quick, monkeypatch) as (gate, entered):
        accepted = [ask(quick, label="cat", n=4)]
        assert entered.wait(10)
        accepted.append(ask(quick, label="cat", n=5))
        with pytest.raises(QueueFull, match="5 pictures wait and 2 more") as caught:
            ask(quick, label="cat", n=2)
        assert 1 <= caught.value.retry_after_s <= 600
        accepted.append(ask(quick, label="cat", n=1))  # what still fits is taken
        gate.set()
        for ticket in accepted:
            ticket.future.result(30)
        ask(quick, label="cat", n=10).future.result(30)  # slots and queue together, when idle
        with pytest.raises(QueueFull):
            ask(quick, label="cat", n=11)


def test_a_request_past_its_deadline_ends_and_the_engine_goes_on():
    slow = threading.Event()

    def slowly(answer, label):
        if slow.is_set():
            time.sleep(0.5)  # as nobody could foresee
        return answer

    engine = wrapped_engine(slowly, slots=2, timeout_s=1)
    with running(engine):
        slow.set()
        tickets = [ask(engine, label="cat", steps=3) for _ in range(4)]
        tickets.append(engine.submit(job_of(engine, label="cat", steps=3), timeout_s=0.4))
        for ticket, seconds in zip(tickets, (1, 1, 1, 1, 0.4), strict=True):
            with pytest.raises(DeadlineExceeded, match=f"{seconds} s"):
                ticket.future.result(30)
        slow.clear()
        engine.timeout_s = 60
        assert len(ask(engine, label="cat", steps=2).future.result(30)) == 1
    engine.timeout_s = 0
    assert len(engine.generate([GenerateRequest(seed=0)])[0]) == 1  # our own drawing has no deadline


def test_what_cannot_be_done_in_time_is_refused_at_once(quick, monkeypatch):
    with running(quick), pytest.raises(RequestError, match=r"ask for fewer pictures or steps") as caught:
        quick.submit(job_of(quick, label="cat", steps=1000, n=10), timeout_s=1e-3)
    assert caught.value.param == "timeout"
    assert caught.value.allowed["minimum"] >= 1
    with waiting_network(quick, monkeypatch) as (gate, entered):
        ahead = [ask(quick, label="cat", n=4, steps=500)]
        assert entered.wait(10)
        mine = job_of(quick, label="cat", steps=2)
        alone = quick.networks.seconds(2) * mine.evaluations
        with pytest.raises(TooBusy, match="later than") as caught:
            quick.submit(mine, timeout_s=alone * 20)
        assert caught.value.retry_after_s >= 1
        assert quick.load()["waiting"] == 0
        for ticket in ahead:
            ticket.cancel()
        gate.set()


def test_the_urgent_go_first(quick, monkeypatch):
    order = []
    with waiting_network(quick, monkeypatch) as (gate, entered):
        ask(quick, label="cat", n=4, steps=2)
        assert entered.wait(10)
        tickets = []
        for priority in ("low", "normal", "high"):
            ticket = quick.submit(job_of(quick, label="cat", n=1, steps=2), priority=priority)
            ticket.future.add_done_callback(lambda _, priority=priority: order.append(priority))
            tickets.append(ticket)
        quick.slots = 1
        gate.set()
        for ticket in tickets:
            ticket.future.result(30)
    quick.slots = 4
    assert order == ["high", "normal", "low"]


# ---- failures ---------------------------------------------------------------------------------------------------


def test_a_sampler_that_raises_fails_its_own_request_only(quick, monkeypatch):
    def broken(x, sigmas, noise):
        yield from SAMPLERS["heun"](x, sigmas[-2:])
        raise ArithmeticError("broken on purpose")

    expected = quick.generate([GenerateRequest(label="cat", seed=1)])[0]
    with monkeypatch.context() as patch:
        patch.setitem(SAMPLERS, "ddim", Sampler(broken, stochastic=True))
        with running(quick):
            good = ask(quick, label="cat", seed=1)
            bad = ask(quick, label="cat", seed=1, sampler="ddim")
            with pytest.raises(DrawingFailed, match="broken on purpose"):
                bad.future.result(30)
            assert same(good.future.result(30), expected)


def test_a_sampler_that_cannot_start_fails_its_own_request_only(quick, monkeypatch):
    def unable(x, sigmas, noise):
        raise ArithmeticError("unable")
        yield

    with monkeypatch.context() as patch:
        patch.setitem(SAMPLERS, "ddim", Sampler(unable, stochastic=True))
        with running(quick):
            bad = ask(quick, label="cat", n=6, sampler="ddim")
            good = ask(quick, label="cat", n=4)
            with pytest.raises(DrawingFailed, match="unable"):
                bad.future.result(30)
            assert len(good.future.result(30)) == 4


def test_numbers_that_overflow_fail_their_own_request_only(quick):
    def overflow(answer, label):
        return torch.where(label.view(-1, 1, 1, 1) == 1, answer / 0, answer)

    with running(wrapped_engine(overflow, slots=4)) as engine:
        good = ask(engine, label="cat", seed=1, n=2)
        bad = ask(engine, label="dog", seed=1, n=2)
        with pytest.raises(DrawingFailed, match="not finite"):
            bad.future.result(30)
        assert same(good.future.result(30), quick.generate([GenerateRequest(label="cat", seed=1, n=2)])[0])


def test_a_failed_network_call_fails_those_in_it_and_later_ones_work():
    broken = threading.Event()

    def sometimes(answer, label):
        if broken.is_set():
            raise RuntimeError("out of memory")
        return answer

    with running(wrapped_engine(sometimes, slots=2)) as engine:
        broken.set()
        with pytest.raises(DrawingFailed, match="out of memory"):
            ask(engine, label="cat", n=2).future.result(30)
        broken.clear()
        assert len(ask(engine, label="cat", n=2).future.result(30)) == 2
        assert engine.alive()


def test_generate_raises_the_first_failure_and_gives_up_the_rest():
    engine = wrapped_engine(lambda answer, label: torch.where(label.view(-1, 1, 1, 1) == 1, torch.nan, answer), slots=2)
    with pytest.raises(DrawingFailed):
        engine.generate([GenerateRequest(label="dog", seed=0), GenerateRequest(label="cat", seed=0, steps=1000, n=50)])
    engine.tick()
    assert engine.load() == {"slots": 2, "drawing": 0, "waiting": 0}


def test_the_self_test_refuses_a_network_that_wanders_after_loading():
    calls, loaded = iter(range(10**6)), threading.Event()
    engine = wrapped_engine(lambda answer, label: answer * (1 + next(calls) % 3) if loaded.is_set() else answer)
    loaded.set()
    with pytest.raises(DrawingFailed, match="self-test"):
        engine.self_test()


# ---- life -------------------------------------------------------------------------------------------------------


def test_the_same_weights_give_the_same_pictures_after_another_load(quick):
    again = Engine(random_bundle(), slots=3)
    assert same(again.generate([MIXED[0]])[0], quick.generate([MIXED[0]])[0])
    assert again.self_test() == quick.self_test()


def test_stop_ends_the_thread_and_what_waits(quick):
    before = threading.active_count()
    quick.start()
    assert quick.alive()
    ticket = ask(quick, label="cat", steps=1000)
    quick.stop()
    assert threading.active_count() == before
    assert not quick.alive()
    with pytest.raises(EngineStopped):
        ticket.future.result(0)
    with pytest.raises(EngineStopped, match=r"start\(\)"):
        ask(quick, label="cat")
    with running(quick):  # and it can begin again
        ask(quick, label="cat", steps=2).future.result(30)
        with pytest.raises(ValueError, match="started already"):
            quick.start()


def test_a_network_that_hangs_is_seen(quick, monkeypatch):
    with waiting_network(quick, monkeypatch) as (_, entered):
        ask(quick, label="cat", steps=2)
        assert entered.wait(10)
        assert quick.alive(patience_s=60)
        time.sleep(0.05)
        assert not quick.alive(patience_s=0.01)


def test_an_engine_needs_a_slot():
    with pytest.raises(ValueError, match="slots=0"):
        Engine(random_bundle(), slots=0)
