"""Who may come in: a request that would wait too long, or be done too late, is refused at once, with when to ask again."""

import math
from collections import deque
from collections.abc import Callable, Sequence

from diffusion.serving.admission import Admission
from diffusion.serving.flight import Flight
from diffusion.serving.forecast import Outlook, outlook
from diffusion.serving.priority import Priority
from diffusion.serving.request import RequestError
from diffusion.serving.ticket import QueueFull, Ticket, TooBusy

PLACES: dict[Priority, float] = {"high": 1.25, "normal": 1.0, "low": 0.5}  # shares of the queue that it may fill
_STANDS_S = 10.0  # a queue that was never empty for so long is no burst
_LATELY = 64  # requests
_MOVES, _STALL = 0.05, 100.0  # of the pace: how far a tick moves it, and the slowest that counts


class Patience:
    """How long a request may be expected to wait for its first slot before it is refused.

    A burst may wait `max_wait_s`.  A queue that has stood for a while is no burst but more than can be drawn, and a long one
    would only make all that are drawn late: then as long as the longest drawing lately took.  [as CoDel tells a good queue
    from a bad one: Nichols and Jacobson, "Controlling queue delay", 2012]
    """

    def __init__(self, max_wait_s: float) -> None:
        self.max_wait_s = max_wait_s
        self._empty_at = -math.inf
        self._drew: deque[float] = deque(maxlen=_LATELY)

    def empty(self, now: float) -> None:
        """Nobody waits."""
        self._empty_at = now

    def drew(self, seconds: float) -> None:
        """What a request took from its first slot to its last picture."""
        self._drew.append(seconds)

    def limit_s(self, now: float) -> float:
        """Seconds."""
        if not self._drew or now - self._empty_at < _STANDS_S:
            return self.max_wait_s
        return min(self.max_wait_s, max(self._drew))


class Door:
    """Of an engine that draws so many pictures, and asks so many rows, at once.  For one thread at a time.

    queue: pictures that may wait.  seconds(rows): of a tick, as measured when the engine was made.
    """

    def __init__(self, slots: int, rows: float, queue: int, max_wait_s: float, seconds: Callable[[int], float]) -> None:
        self.slots, self.rows, self.queue, self.seconds = slots, rows, queue, seconds
        self.patience = Patience(max_wait_s)
        self.pace = 1.0  # seconds of a tick over those that its calls took when they were measured, lately

    def ticked(self, rows: int, seconds: float) -> None:
        """What a tick took."""
        self.pace += _MOVES * (min(_STALL, seconds / self.seconds(rows)) - self.pace)

    def check(self, ticket: Ticket, queue: Admission, flights: Sequence[Flight]) -> None:
        """Whether it may wait among these.  Raises QueueFull, TooBusy, or RequestError where even an idle one could not."""
        flights = [flight for flight in flights if not flight.ticket.future.done()]
        waiting, n, limit = queue.pictures, ticket.request.n, int(self.queue * PLACES[ticket.priority])
        full = waiting + n > limit + max(0, self.slots - sum(len(flight.images) for flight in flights))
        if not full and ticket.timeout_s == self.patience.max_wait_s == math.inf:
            return
        # an engine that idled was perhaps slow for a reason that is over
        seen = self._outlook(ticket, queue, flights, self.pace if flights else min(2.0, self.pace))
        if full:
            raise QueueFull(waiting, n, limit, _whole(seen.starts_s))
        if seen.ends_s > ticket.timeout_s:
            alone = self._outlook(ticket, Admission(), (), 1.0).ends_s
            if alone > ticket.timeout_s:
                raise RequestError(
                    f"these pictures take about {alone:.3g} s here, and may take {ticket.timeout_s:.3g}: ask for fewer"
                    " pictures or steps, or allow more time",
                    param="timeout",
                    allowed={"minimum": math.ceil(alone)},
                )
            late = f"they would be done in {seen.ends_s:.3g} s, later than the {ticket.timeout_s:.3g} they may take"
            raise TooBusy(late, _whole(seen.ends_s - ticket.timeout_s))
        if seen.starts_s > (limit_s := self.patience.limit_s(ticket.submitted_at)):
            late = (
                f"{waiting} pictures wait, so these would wait {seen.starts_s:.3g} s, and {limit_s:.3g} is the most now"
            )
            raise TooBusy(late, _whole(seen.starts_s - limit_s))

    def _outlook(self, ticket: Ticket, queue: Admission, flights: Sequence[Flight], pace: float) -> Outlook:
        return outlook(
            (flight.left for flight in flights),
            queue.with_one_more(ticket),
            slots=self.slots,
            rows=self.rows,
            seconds=lambda rows: pace * self.seconds(rows),
        )


def _whole(seconds: float) -> int:
    """For Retry-After: 1 to 600."""
    return min(600, max(1, math.ceil(seconds)))
