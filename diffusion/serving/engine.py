"""Step-level continuous batching: many pictures' conversations at once, one gathered network call a tick.

A request becomes a ticket.  Its pictures wait in one queue, take slots as they come free, and talk to the network through
their samplers' queries.  Each tick gathers the open queries of all of them - any sampler, any steps, guided or not - asks
the network in proven batch sizes, and hands each conversation its answer.  So a picture is a function of the model and
its request alone: noise comes from (seed, number of the picture), arithmetic outside the network is elementwise, and
inside it the ladder keeps rows independent of the batch.  A bundle with a guide has two networks, each with a ladder of
its own; a tick deals the rows out to them.  Pictures of another size are asked in a call of their own.
"""

import logging
import math
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from typing import Literal

import torch
from torch import Tensor

from diffusion.recipe import ServeRecipe
from diffusion.serving.admission import Admission
from diffusion.serving.door import Door
from diffusion.serving.flight import Flight, gather
from diffusion.serving.job import Job, generation
from diffusion.serving.ladder import REFERENCE, Ladder
from diffusion.serving.networks import Networks
from diffusion.serving.proof import Proof
from diffusion.serving.request import GenerateRequest, ResolvedRequest, resolve
from diffusion.serving.ticket import (
    DeadlineExceeded,
    DrawingFailed,
    EngineStopped,
    Picture,
    Preview,
    Priority,
    Ticket,
)
from diffusion.store.bundle import Bundle

_log = logging.getLogger(__name__)
_PROVING_S = 3.0  # that a start may take for the sizes that are asked for seldom
_LARGEST_CALL = {"cpu": 16, "cuda": 64}  # rows; beyond these a call only takes longer


class Engine:
    """Draws pictures with one bundle.

    slots: pictures drawn at once; "auto": as many as fill the call beyond which the measured throughput hardly gains, a
    guided picture counting twice, for it asks for two rows.  queue: pictures that may wait beyond those.  timeout_s: a
    submitted request older than this fails with DeadlineExceeded.  max_wait_s: as `Patience` has it.  `submit` needs
    `start`; `generate` does not.  `on_tick(rows, seconds)`, where one is set, is told of each tick that asked the network,
    in the thread that ticks; it must not raise.
    """

    def __init__(
        self,
        bundle: Bundle,
        slots: int | Literal["auto"] = 16,
        *,
        queue: int = 256,
        timeout_s: float = math.inf,
        max_wait_s: float = math.inf,
    ) -> None:
        if (slots != "auto" and slots < 1) or queue < 0:
            raise ValueError(f"slots={slots}, queue={queue}: an engine needs a slot, and a queue of 0 or more")
        self.bundle = bundle
        self.device = next(bundle.denoiser.parameters()).device
        largest = _LARGEST_CALL.get(self.device.type, 64)
        if slots != "auto":
            largest = min(largest, 2 ** (2 * slots - 1).bit_length())
        self.networks = Networks(bundle, self.device, largest)
        self.rows = math.inf  # of the network that a tick asks at most
        if slots == "auto":
            # with fewer, short requests would wait for long ones; and a busy machine may measure anything
            self.rows = slots = max(REFERENCE, self.ladder.knee)
            _log.info("%d slots: a call of so many rows takes %s", slots, self.ladder.told())
        self.slots, self.timeout_s = slots, timeout_s
        self._wake = threading.Condition()  # guards the queue, the flights and the worker
        self._ticking = threading.Lock()  # one tick at a time, whoever drives
        self._queue = Admission()
        self._door = Door(self.slots, self.rows, queue, max_wait_s, self.networks.seconds)
        self._flights: list[Flight] = []
        self._worker: threading.Thread | None = None
        self._stopping = False
        self._tick_began = time.monotonic()
        self.on_tick: Callable[[int, float], None] | None = None
        self.proof: Proof | None = None  # that it draws what it should, once it has tested itself

    def job(self, request: ResolvedRequest) -> Job:
        """The pictures of a request, drawn from nothing else."""
        return generation(request, self.bundle, self.device)

    def submit(
        self,
        job: Job,
        *,
        previews: int = 0,
        show: Callable[[Preview], None] | None = None,
        priority: Priority = "normal",
        timeout_s: float = math.inf,
    ) -> Ticket:
        """Queue what is to be drawn, from any thread.  previews, show: as `Ticket` has them.

        timeout_s: the engine's own is the longest.  Raises QueueFull or TooBusy, RequestError where not even an idle engine
        could draw it in time, and EngineStopped if no worker runs.
        """
        with self._wake:
            if not self._running():
                raise EngineStopped("the engine is not running: call start() first")
            ticket = Ticket(job, min(timeout_s, self.timeout_s), previews, show, priority)
            self._door.check(ticket, self._queue, self._flights)
            self._enqueue(ticket)
        return ticket

    def generate(
        self, requests: Sequence[GenerateRequest], progress: Callable[[int, int], None] | None = None
    ) -> list[list[Picture]]:
        """Draw all pictures of all requests, however many, and wait.  Returns one list per request, in their order.

        progress(done, total) is told sampler evaluations as they happen.
        """
        jobs = [self.job(resolve(request, self.bundle.spec)) for request in requests]
        return [ticket.future.result() for ticket in self.draw(jobs, progress)]

    def draw(self, jobs: Sequence[Job], progress: Callable[[int, int], None] | None = None) -> list[Ticket]:
        """Draw whatever is to be drawn, and wait.  Returns their tickets, which are over.

        Ticks here, unless a worker runs; several threads may call it.  The first failure is raised and gives up the rest.
        """
        tickets = [Ticket(job) for job in jobs]
        total = sum(ticket.progress.total for ticket in tickets)
        with self._wake:
            for ticket in tickets:
                self._enqueue(ticket)
        try:
            for ticket in tickets:
                while not ticket.future.done():
                    if self._running():
                        wait([ticket.future], timeout=0.1)  # bounded, so that progress can be told
                    else:
                        self.tick()
                    if progress is not None:
                        progress(sum(t.progress.done for t in tickets), total)
                ticket.future.result()
        finally:
            for ticket in tickets:
                ticket.cancel()
        return tickets

    def self_test(self) -> str:
        """Draw one picture alone and among others: it must be finite and the same.  Returns its pixels' sha256.

        Raises DrawingFailed: an engine that cannot keep its promise must not serve.
        """
        self.proof = Proof.of(self)
        return self.proof.sha256

    def start(self) -> None:
        """Tick in a thread of our own until `stop`.

        Before, for a few seconds, and later when nothing is to be drawn, sizes of pictures are proven that were not.
        """
        began = time.monotonic()
        while time.monotonic() - began < _PROVING_S and self.networks.prove_next():
            pass
        with self._wake:
            if self._worker is not None:
                raise ValueError("the engine was started already: call stop() first")
            self._stopping = False
            self._worker = threading.Thread(target=self._work, name="diffusion-engine", daemon=True)
            self._worker.start()

    def stop(self) -> None:
        """End the worker after its present tick; what is unfinished fails with EngineStopped."""
        with self._wake:
            worker, self._stopping = self._worker, True
            self._wake.notify_all()
        if worker is not None:
            worker.join()
        with self._wake:
            self._worker = None
        with self._ticking:  # one who draws without a worker may be in the midst of a tick
            self._fail_all(EngineStopped("the engine was stopped"))

    def alive(self, patience_s: float = 60.0) -> bool:
        """Whether the worker runs and has not been in one tick for longer than `patience_s`."""
        with self._wake:
            idle = not self._queue and not self._flights
            return self._running() and (idle or time.monotonic() - self._tick_began < patience_s)

    def load(self) -> dict[str, int]:
        """Slots, pictures in them, and pictures waiting, now."""
        with self._wake:
            return {"slots": self.slots, "drawing": self._flying(), "waiting": self._queue.pictures}

    @classmethod
    def serving(cls, bundle: Bundle, limits: ServeRecipe) -> "Engine":
        """With the limits of an endpoint."""
        return cls(bundle, limits.slots, queue=limits.queue, timeout_s=limits.timeout_s, max_wait_s=limits.max_wait_s)

    @property
    def ladder(self) -> Ladder:
        """Of the model itself, for pictures of its own size."""
        return self.networks.ladder_of(self.bundle.denoiser, self.bundle.spec.size)

    def denoise(self, x: Tensor, sigma: Tensor, **cond: Tensor) -> Tensor:
        """D(x; sigma) of every row, with the bits it would have alone; by the guide where its column `model` is 1."""
        return self.networks.denoise(x, sigma, **cond)

    def tick(self) -> int:
        """Admit, gather, ask, answer: one evaluation for every picture in a slot.  Returns the rows asked, 0 if idle."""
        with self._ticking, torch.no_grad():
            self._tick_began = time.monotonic()
            self._retire()
            self._admit()
            flights = [flight for flight in self._flights if not flight.ticket.future.done()]
            if not flights:
                return 0
            rows = sum(len(flight.query.x) for flight in flights)
            same: dict[tuple[int, ...], list[Flight]] = {}
            for flight in flights:
                same.setdefault(tuple(flight.query.x.shape[2:]), []).append(flight)
            asking = [flight for group in same.values() for flight in self._ask(group)]
            with self._wake:
                self._flights = asking
            took = time.monotonic() - self._tick_began
            self._door.ticked(rows, took)
            if self.on_tick is not None:
                self.on_tick(rows, took)
            return rows

    def _ask(self, flights: list[Flight]) -> list[Flight]:
        """Answer the open queries of flights of one size.  Returns those that ask again."""
        rows = [len(flight.query.x) for flight in flights]
        try:
            x, sigma, cond = gather([flight.query for flight in flights])
            answer = self.denoise(x, sigma, **cond)
            finite = answer.isfinite().flatten(1).all(1).cpu().split(rows)
        except Exception as error:  # the call was everyone's, so its failure is too; later requests get their own
            for flight in flights:
                flight.ticket.fail(DrawingFailed(f"the network call failed: {error}"))
            return []
        parts = zip(flights, answer.split(rows), finite, strict=True)
        return [flight for flight, part, ok in parts if flight.hand(part, finite=bool(ok.all()))]

    def _work(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(
                    lambda: self._stopping or self._queue or self._flights or not self.networks.all_proven
                )
                if self._stopping:
                    return
                idle = not (self._queue or self._flights)
            try:
                if idle:
                    self.networks.prove_next()
                else:
                    self.tick()
            except BaseException as error:  # a defect of ours: say so to all who wait, and be seen dead by `alive`
                self._fail_all(EngineStopped(f"the engine failed: {error}"))
                raise

    def _retire(self) -> None:
        """Drop tickets that are cancelled, failed or past their deadline, and so free their slots."""
        now = time.monotonic()
        with self._wake:
            for ticket in self._tickets():
                if ticket.deadline < now:
                    ticket.fail(DeadlineExceeded(f"given up after {ticket.timeout_s:g} s"))
            self._queue.drop_ended()
            self._flights = [flight for flight in self._flights if not flight.ticket.future.done()]

    def _admit(self) -> None:
        """Give free slots to those whose turn it is."""
        while True:
            with self._wake:
                flying = [flight for flight in self._flights if not flight.ticket.future.done()]
                rows = sum(len(flight.images) * flight.ticket.job.rows for flight in flying)
                turn = self._queue.take(self.slots - self._flying(), self.rows - rows)
                if turn is None:
                    return
                ticket, images = turn
                ticket.started_at = ticket.started_at or time.monotonic()
            flight = Flight.depart(ticket, images, self.bundle)
            with self._wake:
                if flight is None:
                    self._queue.drop_ended()
                else:
                    self._flights.append(flight)

    def _running(self) -> bool:
        return self._worker is not None and self._worker.is_alive() and not self._stopping

    def _enqueue(self, ticket: Ticket) -> None:
        now = time.monotonic()
        if not self._queue:
            self._door.patience.empty(now)
            if not self._flights:
                self._tick_began = now  # it was idle until now, not stuck
        patience, found = self._door.patience, weakref.ref(ticket)  # weakly, as `Ticket` does

        def ended(_: Future) -> None:
            if (ticket := found()) and ticket.started_at:
                patience.drew(ticket.drew_s)

        ticket.future.add_done_callback(ended)
        self._queue.add(ticket)
        self._wake.notify_all()

    def _fail_all(self, error: Exception) -> None:
        with self._wake:
            for ticket in self._tickets():
                ticket.fail(error)
            self._queue.clear()
            self._flights = []

    def _tickets(self) -> set[Ticket]:
        return {*self._queue, *(flight.ticket for flight in self._flights)}

    def _flying(self) -> int:
        return sum(len(flight.images) for flight in self._flights if not flight.ticket.future.done())
