"""A request inside the engine: what its caller holds, and the ways it can end without pictures."""

import math
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from diffusion.serving.job import Job
from diffusion.serving.priority import Priority
from diffusion.serving.request import ResolvedRequest

Picture = np.ndarray  # uint8 (H, W, 3)


class QueueFull(RuntimeError):
    """Too many pictures wait already; in `retry_after_s` seconds, by the speed measured at load, they will be drawn."""

    def __init__(self, waiting: int, n: int, limit: int, retry_after_s: int) -> None:
        super().__init__(
            f"{waiting} pictures wait and {n} more were asked for, but {limit} may wait. Ask again in {retry_after_s} s"
        )
        self.retry_after_s = retry_after_s


class TooBusy(RuntimeError):
    """It would wait longer than it may, or be done too late; in `retry_after_s` seconds it would not."""

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(f"{message}. Ask again in {retry_after_s} s")
        self.retry_after_s = retry_after_s


class DeadlineExceeded(TimeoutError):
    """The request was older than the engine's timeout before its last picture was done."""


class EngineStopped(RuntimeError):
    """The engine ended before the pictures were done; another one can be asked."""


class DrawingFailed(RuntimeError):
    """These pictures cannot be drawn: numbers went non-finite, or the conversation or its network call failed."""


class Progress(NamedTuple):
    """How far a request is, in sampler evaluations summed over its pictures (a guided pair of rows counts once)."""

    done: int
    total: int


class Preview(NamedTuple):
    """A picture that is not done: which of the request's, its how many-th preview, from 0, and how it looks."""

    image: int
    number: int
    picture: Picture


@dataclass(eq=False)
class Ticket:
    """A request in the engine.  `future` gives its pictures, a list of uint8 (H, W, 3), or raises how it ended.

    timeout_s: it fails where it is not done that long after it was submitted.
    previews: how often `show`, called in the engine's thread, is given each picture as it looks on its way there.

    The engine never marks the future as running, so it can be cancelled until the last picture is done; its slots are
    free at the next tick.
    """

    job: Job
    timeout_s: float = math.inf
    previews: int = 0
    show: Callable[[Preview], None] | None = None
    priority: Priority = "normal"
    future: "Future[list[Picture]]" = field(default_factory=Future)
    started: int = 0  # pictures that have had a slot
    asked: int = 0  # evaluations answered, over all pictures
    submitted_at: float = field(default_factory=time.monotonic)
    started_at: float | None = None  # when its first picture had a slot
    ended_at: float | None = None
    off: dict[int, float] = field(default_factory=dict)  # by picture, as `Job.off` has it
    _pictures: dict[int, Picture] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # weakly: a ticket and its future would keep each other, and the model, until Python looks for garbage
        me = weakref.ref(self)

        def ended(_: Future) -> None:
            if ticket := me():
                ticket.ended_at = time.monotonic()

        self.future.add_done_callback(ended)

    @property
    def deadline(self) -> float:
        """Of time.monotonic()."""
        return self.submitted_at + self.timeout_s

    @property
    def waited_s(self) -> float:
        """Seconds until its first picture had a slot, or until now or its end where none had."""
        return (self.started_at or self.ended_at or time.monotonic()) - self.submitted_at

    @property
    def drew_s(self) -> float:
        """Seconds from then until its end, or until now."""
        return 0.0 if self.started_at is None else (self.ended_at or time.monotonic()) - self.started_at

    @property
    def request(self) -> ResolvedRequest:
        return self.job.request

    @property
    def waiting(self) -> int:
        """Pictures that have not had a slot yet."""
        return self.request.n - self.started

    @property
    def progress(self) -> Progress:
        return Progress(self.asked, self.request.n * self.job.evaluations)

    def cancel(self) -> bool:
        """Give the request up.  False if it is over already."""
        return self.future.cancel()

    def fail(self, error: Exception) -> None:
        """End with this error, unless it is over already."""
        if not self.future.done() and self.future.set_running_or_notify_cancel():
            self.future.set_exception(error)

    def add(self, first: int, pictures: Sequence[Picture], off: Sequence[float] | None = None) -> None:
        """Hand over pictures number `first` and following; with the last missing one the ticket is over."""
        self.off.update(enumerate(off or (), first))
        self._pictures.update(enumerate(pictures, first))
        if len(self._pictures) == self.request.n and self.future.set_running_or_notify_cancel():
            self.future.set_result([self._pictures[i] for i in range(self.request.n)])
