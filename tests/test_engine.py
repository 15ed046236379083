import random
import threading
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch

from diffusion.data.images import to_uint8
from diffusion.guidance import classifier_free, conditioned
from diffusion.random import Stream, normal
from diffusion.recipe import SamplingRecipe
from diffusion.sampler import SAMPLERS, evaluations, run
from diffusion.schedule import karras_sigmas
from diffusion.serving.engine import Engine, trial_query
from diffusion.serving.flight import converse
from diffusion.serving.request import GenerateRequest, resolve
from diffusion.serving.ticket import DeadlineExceeded, DrawingFailed, EngineStopped, QueueFull
from diffusion.spacing import sampling_sigmas
from tests.random_bundle import CLASSES, RESOLUTION, random_bundle, restoring_bundle

pytestmark = pytest.mark.usefixtures("one_thread")

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


@pytest.fixture(scope="module", params=["bf16", "fp32"])
def engine(request) -> Engine:
    return Engine(random_bundle(request.param), slots=5)


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
    gate, entered, inner = threading.Event(), threading.Event(), engine.ladder.answer

    class Gated:
        sizes, seconds = engine.ladder.sizes, engine.ladder.seconds

        def answer(self, denoise, query):
            entered.set()
            assert gate.wait(30)
            return inner(denoise, query)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "ladder", Gated())
        with running(engine):
            try:
                yield gate, entered
            finally:
                gate.set()


def ask(engine: Engine, **fields):
    return engine.submit(resolve(GenerateRequest(**fields), engine.bundle.spec))


def same(left, right) -> bool:
    return len(left) == len(right) and all(np.array_equal(a, b) for a, b in zip(left, right, strict=True))


# ---- batched == alone -------------------------------------------------------------------------------------------


def test_pictures_are_the_same_alone_and_among_others(engine):
    alone = [engine.generate([request])[0] for request in MIXED]
    assert len({picture.tobytes() for pictures in alone for picture in pictures}) == sum(r.n for r in MIXED)
    for seed in range(3):
        order = random.Random(seed).sample(range(len(MIXED)), len(MIXED))
        together = engine.generate([MIXED[i] for i in order])
        for i, pictures in zip(order, together, strict=True):
            assert same(pictures, alone[i])


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_pictures_are_the_same_alone_and_among_others_with_two_threads(precision):
    torch.set_num_threads(2)
    try:
        engine = Engine(random_bundle(precision), slots=4)
        requests = [MIXED[3], MIXED[5]]
        alone = [engine.generate([request])[0] for request in requests]
        for pictures, expected in zip(engine.generate(requests), alone, strict=True):
            assert same(pictures, expected)
    finally:
        torch.set_num_threads(1)


def test_pictures_do_not_depend_on_the_number_of_slots(engine):
    small = Engine(engine.bundle, slots=1)
    large = Engine(engine.bundle, slots=16)
    for left, right in zip(small.generate(MIXED), large.generate(MIXED), strict=True):
        assert same(left, right)


def test_a_picture_does_not_depend_on_how_many_its_request_has(engine):
    many = engine.generate([GenerateRequest(label="cat", seed=9, n=7)])[0]
    for n in (1, 2, 3):
        assert same(engine.generate([GenerateRequest(label="cat", seed=9, n=n)])[0], many[:n])


def test_pictures_are_the_same_when_many_threads_ask_a_running_engine(engine):
    alone = engine.generate(MIXED)
    wanted = [i for i in range(len(MIXED)) for _ in range(3)]
    random.Random(0).shuffle(wanted)
    with running(engine), ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda i: ask(engine, **MIXED[i].model_dump()).future.result(60), wanted))
    for i, pictures in zip(wanted, got, strict=True):
        assert same(pictures, alone[i])


@pytest.mark.parametrize("spacing", ["karras", "exponential", "trailing", "leading", "linspace"])
def test_levels_are_spaced_as_the_models_recipe_says(spacing):
    bundle = random_bundle("fp32")
    recipe = SamplingRecipe(sampler="ddim", spacing=spacing, chain="cosine")
    bundle = replace(bundle, spec=bundle.spec.model_copy(update={"sampling": recipe}))
    levels = []

    def denoise(x, sigma, **cond):
        levels.append(sigma.item())
        return x

    run(converse(resolve(GenerateRequest(steps=7), bundle.spec), range(1), bundle, torch.device("cpu")), denoise)
    assert levels == pytest.approx(sampling_sigmas(recipe, 7)[:-1].tolist())


@pytest.mark.parametrize("index", range(len(MIXED)))
def test_pictures_are_those_of_the_plain_sampler(index):
    """An independent slow version: the samplers run by hand, one picture at a time, without engine or ladder."""
    bundle, request = random_bundle("fp32"), MIXED[index]
    recipe = bundle.spec.sampling
    sigmas = karras_sigmas(request.steps or recipe.steps, sigma_min=recipe.sigma_min, sigma_max=recipe.sigma_max)
    guidance = recipe.guidance if request.guidance is None else request.guidance
    null = torch.tensor([len(CLASSES)])
    for i, picture in enumerate(Engine(bundle, slots=8).generate([request])[0]):
        shape = (3, RESOLUTION, RESOLUTION)
        x = normal(request.seed, Stream.INITIAL, torch.tensor([i]), shape) * recipe.sigma_max
        fresh = [normal(request.seed, Stream.CHURN, torch.tensor([(step << 32) + i]), shape) for step in range(50)]
        conversation = SAMPLERS[request.sampler or recipe.sampler](x, sigmas, fresh.__getitem__)
        if request.label is None:
            conversation = conditioned(conversation, {"label": null})
        else:
            label = torch.tensor([CLASSES.index(request.label)])
            conversation = classifier_free(conversation, {"label": label}, {"label": null}, guidance)
        expected = to_uint8(run(conversation, bundle.denoiser))[0].numpy()
        # the batch sizes differ, so the last bits of fp32 do, which may tip a pixel over a rounding
        assert np.abs(picture.astype(int) - expected.astype(int)).max() <= 1


def test_a_model_that_restores_draws_as_with_nothing_beside_x():
    bundle = restoring_bundle()
    engine = Engine(bundle, slots=4)
    (picture,) = engine.generate([GenerateRequest(seed=3, sampler="ddim", steps=4)])[0]
    recipe = bundle.spec.sampling
    sigmas = karras_sigmas(4, sigma_min=recipe.sigma_min, sigma_max=recipe.sigma_max)
    x = normal(3, Stream.INITIAL, torch.tensor([0]), (3, RESOLUTION, RESOLUTION)) * recipe.sigma_max
    expected = to_uint8(run(SAMPLERS["ddim"](x, sigmas), bundle.denoiser))[0].numpy()
    assert np.abs(picture.astype(int) - expected.astype(int)).max() <= 1
    shown = trial_query(bundle.spec, 8, 0, torch.device("cpu")).cond["image"].flatten(1).any(dim=1)
    assert 0 < shown.sum() < 8  # the ladder is proven with measurements and without


def test_the_same_weights_give_the_same_pictures_after_another_load(quick):
    again = Engine(random_bundle(), slots=3)
    assert same(again.generate([MIXED[0]])[0], quick.generate([MIXED[0]])[0])
    assert again.self_test() == quick.self_test()


# ---- filling slots ----------------------------------------------------------------------------------------------


def test_slots_are_filled_until_the_last_wave(quick, monkeypatch):
    rows, tick = [], quick.tick
    monkeypatch.setattr(quick, "tick", lambda: rows.append(tick()))
    requests = [GenerateRequest(label="cat", guidance=1, n=3, steps=3, seed=i) for i in range(4)]
    quick.generate(requests)
    waves = 12 // quick.slots
    assert rows == [quick.slots] * (waves * evaluations("heun", 3))


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
    engine = Engine(random_bundle(), slots=2, timeout_s=0.1)
    with running(engine):
        slow = ask(engine, label="cat", n=2, steps=1000)
        behind = ask(engine, label="cat", steps=2)
        for ticket in (slow, behind):
            with pytest.raises(DeadlineExceeded, match=r"0\.1 s"):
                ticket.future.result(30)
        engine.timeout_s = 60
        assert len(ask(engine, label="cat", steps=2).future.result(30)) == 1
    engine.timeout_s = 0
    assert len(engine.generate([GenerateRequest(seed=0)])[0]) == 1  # our own drawing has no deadline


# ---- failures ---------------------------------------------------------------------------------------------------


def test_a_sampler_that_raises_fails_its_own_request_only(quick, monkeypatch):
    def broken(x, sigmas, noise):
        yield from SAMPLERS["heun"](x, sigmas[-2:])
        raise ArithmeticError("broken on purpose")

    expected = quick.generate([GenerateRequest(label="cat", seed=1)])[0]
    with monkeypatch.context() as patch:
        patch.setitem(SAMPLERS, "ddim", broken)
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
        patch.setitem(SAMPLERS, "ddim", unable)
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
