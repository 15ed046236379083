"""A model made ready to draw: its weights read and verified, its batch sizes proven, a picture drawn."""

import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from diffusion.recipe import ServeRecipe
from diffusion.serving.engine import Engine
from diffusion.serving.self_tests import check_noted
from diffusion.store.bundle import load_bundle
from diffusion.store.bundle_spec import BundleSpec, read_spec
from diffusion.store.refs import ModelRef
from diffusion.threads import rest, resting

_NICENESS = 10  # of the thread that makes a model ready while others draw
_REST = 3.0  # times as long as each of its calls took, it then leaves to those
_log = logging.getLogger(__name__)


class Source(Protocol):
    """Where models come from."""

    def spec(self, model: ModelRef) -> BundleSpec: ...

    def size(self, model: ModelRef) -> int:
        """Bytes of its weights."""

    def open(self, model: ModelRef) -> Engine:
        """One that is not started."""


@dataclass(frozen=True)
class Bundles:
    """Models as published bundles, verified when they are opened.  device: where they draw; limits: of each engine."""

    limits: ServeRecipe
    device: str = "cpu"

    def spec(self, model: ModelRef) -> BundleSpec:
        return read_spec(Path(model.uri), model.digest)[0]

    def size(self, model: ModelRef) -> int:
        return sum(Path(model.uri, name).stat().st_size for name in self.spec(model).weights)

    def open(self, model: ModelRef) -> Engine:
        return Engine.serving(load_bundle(model.uri, self.device, digest=model.digest), self.limits)


@dataclass(eq=False)
class Held:
    """A model that is loaded."""

    model: ModelRef
    engine: Engine
    self_test: str  # sha256 of the picture it drew when it was loaded
    size: int  # bytes of its weights
    holders: int = 0  # requests that are not answered
    asked_at: float = field(default_factory=time.monotonic)

    def facts(self) -> dict:
        """Plain values."""
        return {
            "model": self.model.name,
            "version": self.model.version,
            "bundle_digest": self.model.digest,
            "self_test_sha256": self.self_test,
            "proved_s_ago": self.engine.proof and round(self.engine.proof.age_s, 1),
            "weights_mib": round(self.size / 2**20, 1),
            "requests": self.holders,
            **self.engine.load(),
        }


def ready(
    source: Source,
    model: ModelRef,
    notes: Path | None,
    on_tick: Callable[[int, float], None],
    *,
    gently: bool,
) -> Held:
    """The model, loaded and tested, its engine started.  notes: as `check_noted` has them.

    gently: at a low priority, for others draw.  It is loaded in a thread of its own, for a priority once lowered stays so;
    the engine's thread is started here, for it has the niceness of the one that starts it.
    """
    done: Future[Held] = Future()

    def prepare() -> None:
        try:
            if gently:
                _yield_processors()
            with resting(_REST if gently else 0):
                engine = source.open(model)
                engine.on_tick = lambda _rows, seconds: rest(seconds)
                self_test = engine.self_test()
            check_noted(notes, model.digest, engine.device, self_test)
            engine.on_tick = on_tick
            done.set_result(Held(model, engine, self_test, source.size(model)))
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=prepare, name="diffusion-prepare", daemon=True).start()
    held = done.result()
    with resting(_REST if gently else 0):  # it proves other sizes of picture first
        held.engine.start()
    return held


def _yield_processors() -> None:
    """Lower this thread's priority, and that of those it starts.  On Linux niceness is a thread's."""
    try:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
    except (AttributeError, OSError):  # another system: loading then takes its share
        _log.debug("threads have no priorities here")
