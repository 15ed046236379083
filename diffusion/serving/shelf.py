"""The models of one process: several engines, changed under load without a request noticing.

What is to be offered is a `Lineup`.  A new one is made ready beside the old - weights read and verified, batch sizes proven,
a picture drawn - by a thread of low priority, and only then do new requests go to it.  A request holds the model it began
with until its last byte, so the old engine ends with its last picture, and its memory is free.  What cannot be made ready
is refused with a reason, and the old lineup goes on.

The present model and its canaries are always loaded.  Others are where there is room, and else when one asks for them; the
one that was asked for longest ago makes room, if nobody holds it.
"""

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from pathlib import Path

from diffusion.heap import keep_large_apart
from diffusion.serving.held import Held, Source, ready
from diffusion.serving.lineup import Key, Lineup
from diffusion.serving.ticket import EngineStopped
from diffusion.store.bundle_spec import BundleSpec
from diffusion.store.refs import ModelRef

MIB = 2**20
_PATIENCE_S = 30.0  # for a model to be given back whose place is needed
_FORGIVEN_S = 60.0  # after a failure to load, until a request may cause another
_log = logging.getLogger(__name__)


class Refused(RuntimeError):
    """A model cannot be made ready; the message says why."""


class Shelf:
    """What one process offers.  room: bytes of weights that may be held at once, by more than one model.  notes: folder of
    what self-tests drew here before.  `on_tick`, where one is set, is told (model, rows, seconds) of each engine's ticks.

    All methods may be called from any thread.  `change`, and who waits for a `summoned` model, take as long as loading does.
    """

    def __init__(self, source: Source, room: int = 4_096 * MIB, notes: Path | None = None) -> None:
        keep_large_apart()  # weights come and go
        self.source, self.room, self.notes = source, room, notes
        self.on_tick: Callable[[ModelRef, int, float], None] | None = None
        self.since = int(time.time())  # seconds since 1970
        self.lineup: Lineup | None = None
        self._specs: dict[Key, BundleSpec] = {}  # of the lineup
        self._changed = threading.Condition()  # guards all below
        self._held: dict[Key, Held] = {}
        self._coming: dict[Key, Future[Held]] = {}
        self._failures: dict[Key, tuple[float, str]] = {}  # when, and why
        self._needed: set[Key] = set()  # what must not be put away: of the lineup, and of the one being made ready
        self._wanted: Lineup | None = None  # the newest
        self._refused: tuple[Lineup, str] | None = None  # the newest, if it was refused
        self._closed = False
        self._changing = threading.Lock()  # one lineup is made ready at a time
        self._loading = threading.Lock()  # and one model

    def change(self, lineup: Lineup) -> None:
        """Offer this as soon as it is ready, and return then.  Raises Refused; then what was offered before still is.

        Of several that come at once the newest counts, and those between are passed over.
        """
        self._want(lineup)
        self._change(lineup)

    def change_soon(self, lineup: Lineup) -> None:
        """`change`, in a thread; `state` tells how it went."""
        self._want(lineup)

        def change() -> None:
            with suppress(Refused):  # `state` has it, and the log
                self._change(lineup)

        threading.Thread(target=change, name="diffusion-change", daemon=True).start()

    def take(self, model: ModelRef) -> Held | None:
        """Hold it, if it is loaded, until `give_back`."""
        with self._changed:
            held = self._held.get(Key.of(model))
            if held is not None:
                held.holders += 1
                held.asked_at = time.monotonic()
            return held

    def give_back(self, held: Held) -> None:
        """Nothing of a request needs it any more."""
        with self._changed:
            held.holders -= 1
            self._clear()
            self._changed.notify_all()

    def summoned(self, model: ModelRef) -> "Future[Held]":
        """The model, once it is loaded, which begins now if it has not.  Fails with Refused."""
        key = Key.of(model)
        with self._changed:
            if key in self._coming:
                return self._coming[key]
            future: Future[Held] = Future()
            failed_at, why = self._failures.get(key, (-_FORGIVEN_S, ""))
            if key in self._held:
                future.set_result(self._held[key])
            elif self._closed:
                future.set_exception(Refused("the server is shutting down"))
            elif time.monotonic() - failed_at < _FORGIVEN_S:
                future.set_exception(Refused(why))
            else:
                self._coming[key] = future
                threading.Thread(target=self._load, args=(model,), name="diffusion-load", daemon=True).start()
            return future

    def offered(self) -> tuple[Lineup, dict[Key, BundleSpec]]:
        """The lineup and the facts of its models, of one moment.  Raises EngineStopped where nothing is served."""
        with self._changed:
            if self.lineup is None:
                raise EngineStopped("nothing is served")
            return self.lineup, self._specs

    def held(self) -> list[Held]:
        """What is loaded, the present model first."""
        with self._changed:
            present = self.lineup and Key.of(self.lineup.present)
            return sorted(self._held.values(), key=lambda held: Key.of(held.model) != present)

    def load(self) -> dict[str, int]:
        """The present model's slots, and the pictures in slots and waiting of all."""
        loads = [held.engine.load() for held in self.held()]
        slots = loads[0]["slots"] if loads else 1
        return {"slots": slots} | {name: sum(load[name] for load in loads) for name in ("drawing", "waiting")}

    def alive(self) -> bool:
        """Whether there is a lineup and all engines run."""
        return self.lineup is not None and all(held.engine.alive() for held in self.held())

    def state(self) -> dict:
        """Plain values: what is offered, what is loaded, what is being loaded, and why what was wanted is not served."""
        with self._changed:
            refused = self._refused
            about = {
                "lineup": self.lineup and self.lineup.model_dump(mode="json"),
                "loading": [{"model": key.name, "version": key.version} for key in self._coming],
                "failed": [
                    {"model": key.name, "version": key.version, "reason": why}
                    for key, (_, why) in self._failures.items()
                ],
                "refused": refused and {"lineup": refused[0].model_dump(mode="json"), "reason": refused[1]},
            }
        return about | {"loaded": [held.facts() for held in self.held()]}

    def close(self) -> None:
        """Stop all engines; what they draw fails."""
        with self._changed:
            self._closed, self.lineup = True, None
            held, self._held = list(self._held.values()), {}
            self._changed.notify_all()
        for each in held:
            each.engine.stop()

    def _change(self, lineup: Lineup) -> None:
        with self._changing:
            if self._wanted != lineup or lineup == self.lineup:
                return
            with self._changed:
                self._needed |= {Key.of(model) for model in lineup.kept}
            try:
                specs = {Key.of(model): self._spec(model) for model in lineup.models}
                for model in lineup.kept:
                    with self._changed:
                        self._failures.pop(Key.of(model), None)
                    self.summoned(model).result()
            except Refused as error:
                _log.error("%s version %s is not served: %s", lineup.present.name, lineup.present.version, error)
                with self._changed:
                    if self._wanted == lineup:
                        self._refused = (lineup, str(error))
                raise
            else:
                with self._changed:
                    if not self._closed and self._wanted == lineup:  # else a newer one came meanwhile
                        self.lineup, self._specs, self._refused = lineup, specs, None
            finally:
                with self._changed:
                    self._needed = {Key.of(model) for model in self.lineup.kept} if self.lineup else set()
                    self._clear()
                    self._changed.notify_all()
        threading.Thread(target=self._fill, args=(lineup,), name="diffusion-fill", daemon=True).start()

    def _want(self, lineup: Lineup) -> None:
        with self._changed:
            self._wanted = lineup
            if lineup != self.lineup:
                self._refused = None

    def _spec(self, model: ModelRef) -> BundleSpec:
        try:
            return self.source.spec(model)
        except (ValueError, OSError) as error:
            raise Refused(f"{model.name} version {model.version}: {_told(error, model)}") from error

    def _fill(self, lineup: Lineup) -> None:
        """Load what else there is room for."""
        for model in lineup.models:
            size = self._size(model)
            with self._changed:
                if self.lineup is not lineup or (Key.of(model) not in self._held and not self._fits(size)):
                    return
            if error := self.summoned(model).exception():
                _log.warning("%s version %s is not loaded: %s", model.name, model.version, error)

    def _load(self, model: ModelRef) -> None:
        key = Key.of(model)
        try:
            with self._loading:
                self._make_room(self.source.size(model))
                told = partial(self._ticked, model)
                held = ready(self.source, model, self.notes, told, gently=bool(self.held()))
            with self._changed:
                if self._closed:
                    self._put_away(held)
                    raise Refused("the server is shutting down")
                self._held[key] = held
                self._failures.pop(key, None)
                future = self._coming.pop(key)
        except Exception as error:
            why = _told(error, model)
            with self._changed:
                self._failures[key] = (time.monotonic(), why)
                future = self._coming.pop(key)
            future.set_exception(Refused(why))
            return
        future.set_result(held)

    def _ticked(self, model: ModelRef, rows: int, seconds: float) -> None:
        if self.on_tick is not None:
            self.on_tick(model, rows, seconds)

    def _size(self, model: ModelRef) -> int:
        """0 where it is not there any more, which is said when it is loaded."""
        with suppress(ValueError, OSError):
            return self.source.size(model)
        return 0

    def _fits(self, size: int) -> bool:
        return not self._held or size + sum(held.size for held in self._held.values()) <= self.room

    def _make_room(self, size: int) -> None:
        """Put away what nobody holds, the one asked for longest ago first.  Raises Refused where the rest is held."""
        deadline = time.monotonic() + _PATIENCE_S
        with self._changed:
            while not self._fits(size):
                others = [held for key, held in self._held.items() if key not in self._needed]
                idle = [held for held in others if not held.holders]
                if idle:
                    self._put_away(min(idle, key=lambda held: held.asked_at))
                elif not others or not self._changed.wait(deadline - time.monotonic()):
                    there = ", ".join(
                        f"{held.size / MIB:.0f} of {key.name}@{key.version}" for key, held in self._held.items()
                    )
                    raise Refused(
                        f"it has {size / MIB:.0f} MiB of weights, beside {there}, and a replica may hold"
                        f" {self.room / MIB:.0f}: give it more with DIFFUSION_MODELS_MIB, or ask again later"
                    )

    def _clear(self) -> None:
        """Put away what is not offered any more and nobody holds."""
        offered = {Key.of(model) for model in self.lineup.models} if self.lineup else set()
        for key, held in list(self._held.items()):
            if key not in offered | self._needed and not held.holders:
                self._put_away(held)
        self._failures = {key: found for key, found in self._failures.items() if key in offered}

    def _put_away(self, held: Held) -> None:
        self._held.pop(Key.of(held.model), None)
        # in a thread: it waits for the engine's present tick
        threading.Thread(target=held.engine.stop, name="diffusion-stop", daemon=True).start()


def _told(error: Exception, model: ModelRef) -> str:
    """Why a model is not loaded, for everybody: without the folders of this machine."""
    if isinstance(error, OSError) and error.filename:
        return f"{error.strerror}: {Path(str(error.filename)).name}"
    return (str(error) or type(error).__name__).replace(model.uri, f"bundle {model.digest[:16]}")
