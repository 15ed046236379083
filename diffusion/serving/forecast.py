"""When a request will have its slots and its pictures: the engine's own order of turns, run ahead with a clock.

It knows what draws, what waits and how long calls take here.  It does not know who else will come or leave.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable
from typing import NamedTuple


class Part(NamedTuple):
    """Pictures of one request that are drawn alike."""

    pictures: int
    rows: int  # of the network that each asks in a tick
    left: int  # evaluations of each
    mine: bool = False  # of the request that is asked about


class Outlook(NamedTuple):
    """Seconds from now until the first picture has a slot, and until the last is done."""

    starts_s: float
    ends_s: float


def outlook(
    drawing: Iterable[Part],
    waiting: Iterable[Part],
    *,
    slots: int,
    rows: float = math.inf,
    seconds: Callable[[int], float],
) -> Outlook:
    """Of the request whose part is `mine`, which waits.

    waiting: in the order of their turns.  slots, rows: that there are in all.  seconds(rows): of a tick that asks so many.
    """
    flying, coming = list(drawing), deque(waiting)
    missing = sum(part.pictures for part in coming if part.mine)
    clock, starts = 0.0, math.inf
    while missing:
        taken, asked = _taken(flying)
        while coming:
            part = coming.popleft()
            room = int(min(slots - taken, (rows - asked) // part.rows, part.pictures))
            if room < part.pictures:
                coming.appendleft(part._replace(pictures=part.pictures - max(0, room)))
            if room < 1:
                break
            flying.append(part._replace(pictures=room))
            taken, asked = taken + room, asked + room * part.rows
            if part.mine:
                starts = min(starts, clock)
        ticks = min(part.left for part in flying)
        clock += ticks * seconds(asked)
        missing -= sum(part.pictures for part in flying if part.mine and part.left == ticks)
        flying = [part._replace(left=part.left - ticks) for part in flying if part.left > ticks]
    return Outlook(starts, clock)


def _taken(parts: Iterable[Part]) -> tuple[int, int]:
    """Slots and rows."""
    parts = list(parts)
    return sum(part.pictures for part in parts), sum(part.pictures * part.rows for part in parts)
