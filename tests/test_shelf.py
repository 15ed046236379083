"""Several engines in one process, changed while they draw."""

import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from diffusion.recipe import ServeRecipe
from diffusion.serving.engine import Engine
from diffusion.serving.held import Bundles
from diffusion.serving.lineup import Canary, Lineup
from diffusion.serving.request import GenerateRequest, resolve
from diffusion.serving.shelf import Refused, Shelf
from diffusion.store.refs import ModelRef
from tests.random_bundle import published_model

LIMITS = ServeRecipe(slots=2, queue=8, timeout_s=60)
CAT = GenerateRequest(label="cat", seed=3, steps=3)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[ModelRef]:
    store = tmp_path_factory.mktemp("store")
    return [published_model(store, seed=i, version=str(i + 1)) for i in range(3)]


@pytest.fixture
def shelf(one_thread):
    shelf = Shelf(Bundles(LIMITS))
    yield shelf
    shelf.close()


def until(true: Callable[[], object], within_s: float = 60) -> None:
    deadline = time.monotonic() + within_s
    while not true() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert true()


def loaded(shelf: Shelf) -> set[str]:
    return {held.model.version for held in shelf.held()}


def damaged(store: Path, seed: int, version: str) -> ModelRef:
    """A published bundle one bit of whose weights has turned over since."""
    model = published_model(store, seed=seed, version=version)
    weights = Path(model.uri, "weights.safetensors")
    weights.chmod(0o644)
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    return model


def test_a_request_ends_with_the_model_it_began_with_and_then_that_ones_memory_is_free(shelf, models) -> None:
    shelf.change(Lineup(models=models[:1]))
    old = shelf.take(models[0])
    ticket = old.engine.submit(old.engine.job(resolve(CAT, old.engine.bundle.spec)))
    shelf.change(Lineup(models=models[1:2]))
    assert shelf.lineup.choose(None, 0.0) == models[1]
    assert loaded(shelf) == {"1", "2"}
    assert shelf.alive()
    picture, alone = ticket.future.result(60)[0], Bundles(LIMITS).open(models[0])
    assert (picture == alone.generate([CAT])[0][0]).all()
    shelf.give_back(old)
    assert loaded(shelf) == {"2"}
    gone = weakref.ref(old.engine.bundle.denoiser)
    del old, ticket
    until(lambda: gone() is None)
    assert shelf.take(models[0]) is None


def test_what_cannot_be_loaded_is_refused_with_a_reason_and_the_old_goes_on(shelf, models, tmp_path) -> None:
    shelf.change(Lineup(models=models[:1]))
    broken = damaged(tmp_path, seed=7, version="9")
    for models_wanted, canaries in (
        ((broken,), ()),
        ((models[1], broken), (Canary(version="9", share=0.5),)),
        ((models[1], broken.model_copy(update={"uri": "/nowhere"})), ()),
    ):
        wanted = Lineup(models=models_wanted, canaries=canaries)
        with pytest.raises(Refused, match=r"sha256|no bundle"):
            shelf.change(wanted)
        state = shelf.state()
        assert state["refused"]["lineup"] == wanted.model_dump(mode="json")
        assert "sha256" in state["refused"]["reason"] or "no bundle" in state["refused"]["reason"]
        assert str(tmp_path) not in state["refused"]["reason"]  # everybody may read it
        assert shelf.lineup.present == models[0]
        assert loaded(shelf) == {"1"}
    shelf.change_soon(Lineup(models=models[1:2]))
    until(lambda: shelf.lineup.present == models[1])
    assert shelf.state()["refused"] is None


def test_the_first_lineup_that_is_refused_leaves_nothing(shelf, tmp_path) -> None:
    with pytest.raises(Refused):
        shelf.change(Lineup(models=(damaged(tmp_path, seed=8, version="9"),)))
    assert (shelf.lineup, shelf.held(), shelf.alive()) == (None, [], False)


def test_a_bundle_that_draws_another_picture_than_it_did_is_refused(one_thread, models, tmp_path) -> None:
    notes = tmp_path / "notes"
    for _ in range(2):
        shelf = Shelf(Bundles(LIMITS), notes=notes)
        shelf.change(Lineup(models=models[:1]))
        (held,) = shelf.held()
        shelf.close()
    (note,) = notes.iterdir()
    assert held.self_test in note.read_text()
    note.write_text(note.read_text().replace(held.self_test, "0" * 64))
    shelf = Shelf(Bundles(LIMITS), notes=notes)
    with pytest.raises(Refused, match=rf"had 000000000000 .* Delete notes/{note.name} in"):
        shelf.change(Lineup(models=models[:1]))


def test_no_more_is_held_than_there_is_room_for(one_thread, models) -> None:
    size = Bundles(LIMITS).size(models[0])
    shelf = Shelf(Bundles(LIMITS), room=2 * size)
    try:
        shelf.change(Lineup(models=models))
        until(lambda: loaded(shelf) == {"1", "2"})  # the third has no room
        shelf.summoned(models[2]).result(60)
        assert loaded(shelf) == {"1", "3"}  # the present one stays
        third = shelf.take(models[2])
        waits = shelf.summoned(models[1])
        with pytest.raises(TimeoutError):
            waits.result(0.3)  # for a request draws with the third
        shelf.give_back(third)
        waits.result(60)
        assert loaded(shelf) == {"1", "2"}
        canaries = [Canary(version=version, share=0.1) for version in "23"]
        with pytest.raises(Refused, match="DIFFUSION_MODELS_MIB"):
            shelf.change(Lineup(models=models, canaries=canaries))
        assert shelf.lineup == Lineup(models=models)
    finally:
        shelf.close()


def test_of_many_changes_at_once_the_newest_counts(shelf, models) -> None:
    shelf.change(Lineup(models=models[:1]))
    for each in (models[1], models[2], models[0], models[1], models[2]):
        shelf.change_soon(Lineup(models=(each,)))
    until(lambda: shelf.lineup.present == models[2] and loaded(shelf) == {"3"})
    time.sleep(0.1)
    until(lambda: not [t for t in threading.enumerate() if t.name in ("diffusion-change", "diffusion-load")])
    assert shelf.lineup.present == models[2]


@contextmanager
def held_up(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Engines do not start before the end of the block; the event says that one was to."""
    gate, reached, start = threading.Event(), threading.Event(), Engine.start

    def started(engine: Engine) -> None:
        reached.set()
        assert gate.wait(60)
        start(engine)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "start", started)
        try:
            yield reached
        finally:
            gate.set()


def test_nobody_waits_for_an_engine_that_starts_but_who_asks_for_it(shelf, models, monkeypatch) -> None:
    shelf.change(Lineup(models=models[:1]))
    with ThreadPoolExecutor(1) as pool, held_up(monkeypatch) as reached:
        shelf.change_soon(Lineup(models=models[1:2]))
        assert reached.wait(60)
        shelf.give_back(pool.submit(shelf.take, models[0]).result(20))
    until(lambda: shelf.lineup.present == models[1])


def test_what_is_wanted_no_more_when_it_is_ready_is_passed_over(shelf, models, monkeypatch) -> None:
    first, second = (Lineup(models=(model,)) for model in models[:2])
    shelf.change(first)
    before = shelf.held()
    with ThreadPoolExecutor(1) as pool:
        with held_up(monkeypatch) as reached:
            changing = pool.submit(shelf.change, second)
            assert reached.wait(60)
            shelf.change_soon(first)
        changing.result(60)
    assert shelf.lineup == first
    until(lambda: loaded(shelf) == {"1"})
    assert shelf.held() == before  # it never was put away for the other
