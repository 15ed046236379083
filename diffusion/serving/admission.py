"""Who of those who wait gets the next free slot.

Each ticket has a rank that never changes: when it came, in seconds, put off by what its priority stands back.  The lowest is
next.  So a ticket is passed only by those that come within these seconds after it, and every one has its turn.
"""

import bisect
import math
from collections.abc import Iterator

from diffusion.serving.forecast import Part
from diffusion.serving.priority import Priority
from diffusion.serving.ticket import Ticket

STANDS_BACK_S: dict[Priority, float] = {"high": 0.0, "normal": 30.0, "low": 90.0}


def rank(ticket: Ticket) -> float:
    """The lowest is next."""
    return ticket.submitted_at + STANDS_BACK_S[ticket.priority]


class Admission:
    """The tickets whose pictures wait, in the order of their turns.  For one thread at a time."""

    def __init__(self) -> None:
        self._waiting: list[Ticket] = []

    def __iter__(self) -> Iterator[Ticket]:
        return iter(self._waiting)

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def add(self, ticket: Ticket) -> None:
        """Behind those of the same rank."""
        bisect.insort(self._waiting, ticket, key=rank)

    def take(self, slots: int, rows: float = math.inf) -> tuple[Ticket, range] | None:
        """The pictures that get slots next, all of one ticket; None where it has no room in the free slots and rows.

        A request comes in by parts where its pictures are more than have room.
        """
        if not self._waiting:
            return None
        ticket = self._waiting[0]
        room = int(min(slots, rows // ticket.job.rows, ticket.waiting))
        if room < 1:
            return None
        images = range(ticket.started, ticket.started + room)
        ticket.started = images.stop
        if not ticket.waiting:
            del self._waiting[0]
        return ticket, images

    def drop_ended(self) -> None:
        """Forget the tickets that are over."""
        self._waiting = [ticket for ticket in self._waiting if not ticket.future.done()]

    def clear(self) -> None:
        """Forget all."""
        self._waiting = []

    def with_one_more(self, ticket: Ticket) -> Iterator[Part]:
        """What would wait, in the order of their turns."""
        waiting = list(self._waiting)
        bisect.insort(waiting, ticket, key=rank)
        for one in waiting:
            if not one.future.done():
                yield Part(one.waiting, one.job.rows, one.job.evaluations, one is ticket)

    @property
    def pictures(self) -> int:
        """How many wait."""
        return sum(ticket.waiting for ticket in self._waiting if not ticket.future.done())
