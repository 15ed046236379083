"""What is foreseen of a request, and who is refused by it."""

import math
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffusion.serving.admission import Admission
from diffusion.serving.door import Door
from diffusion.serving.forecast import Outlook, Part, outlook
from diffusion.serving.request import RequestError
from diffusion.serving.ticket import QueueFull, Ticket, TooBusy

PART = st.builds(Part, st.integers(1, 5), st.integers(1, 2), st.integers(1, 9), st.just(False))


def cost(rows: int) -> float:
    return 1.0 + rows / 4


def ticked(drawing, waiting, slots: int, rows: float) -> Outlook:
    """The slow way: picture by picture, tick by tick."""
    flying = [[part.left, part.rows, part.mine] for part in drawing for _ in range(part.pictures)]
    coming = [[part.left, part.rows, part.mine] for part in waiting for _ in range(part.pictures)]
    clock, starts, ends = 0.0, math.inf, math.inf
    while any(mine for _, _, mine in flying + coming):
        while coming and len(flying) < slots and sum(r for _, r, _ in flying) + coming[0][1] <= rows:
            if coming[0][2]:
                starts = min(starts, clock)
            flying.append(coming.pop(0))
        clock += cost(sum(r for _, r, _ in flying))
        for one in flying:
            one[0] -= 1
            if one[0] == 0 and one[2]:
                ends = clock
        flying = [one for one in flying if one[0]]
    return Outlook(starts, ends)


@given(st.lists(PART, max_size=3), st.lists(PART, max_size=5), PART, st.integers(0, 5), st.integers(1, 6), st.data())
def test_it_is_what_ticking_gives(drawing, waiting, mine, place, slots, data):
    rows = data.draw(st.one_of(st.just(math.inf), st.integers(2, 9)))
    drawing = [part for part in drawing if part.pictures <= slots and part.pictures * part.rows <= rows][:1]
    waiting = [*waiting[:place], mine._replace(mine=True), *waiting[place:]]
    found = outlook(drawing, waiting, slots=slots, rows=rows, seconds=cost)
    assert tuple(found) == pytest.approx(tuple(ticked(drawing, waiting, slots, rows)))


def ticket(n: int = 1, evaluations: int = 10, *, at: float = 0.0, **given) -> Ticket:
    job = SimpleNamespace(request=SimpleNamespace(n=n), rows=1, evaluations=evaluations)
    return Ticket(job, submitted_at=at, **given)


def door(**given) -> Door:
    """A second a tick, one picture at once."""
    return Door(
        **{"slots": 1, "rows": math.inf, "queue": 100, "max_wait_s": math.inf} | given, seconds=lambda rows: 1.0
    )


def waiting(*tickets: Ticket) -> Admission:
    queue = Admission()
    for one in tickets:
        queue.add(one)
    return queue


def test_a_deadline_that_cannot_be_met_is_refused_and_one_that_can_is_not():
    queue = waiting(ticket(), ticket())
    door().check(ticket(at=1, timeout_s=30), queue, [])
    with pytest.raises(TooBusy, match=r"later than the 29 they may take\. Ask again in 1 s"):
        door().check(ticket(at=1, timeout_s=29), queue, [])
    with pytest.raises(TooBusy, match="in 10 s") as caught:
        door().check(ticket(at=1, timeout_s=20), queue, [])
    assert caught.value.retry_after_s == 10
    with pytest.raises(RequestError, match="take about 10 s here, and may take 9") as caught:
        door().check(ticket(at=1, timeout_s=9), queue, [])
    assert caught.value.allowed == {"minimum": 10}
    door().check(ticket(at=1, timeout_s=10, priority="high"), queue, [])  # it passes the others


def test_who_would_wait_too_long_is_refused():
    queue = waiting(ticket(), ticket())
    door(max_wait_s=20).check(ticket(at=1), queue, [])
    with pytest.raises(TooBusy, match=r"would wait 20 s, and 15 is the most now\. Ask again in 5 s"):
        door(max_wait_s=15).check(ticket(at=1), queue, [])


def test_a_queue_that_stands_is_kept_as_short_as_a_drawing_takes():
    standing, queue = door(max_wait_s=30), waiting(ticket(), ticket())
    standing.patience.empty(now=0.0)
    standing.patience.drew(12.0)
    standing.patience.drew(3.0)
    standing.check(ticket(at=9), queue, [])  # a burst
    with pytest.raises(TooBusy, match="12 is the most now"):
        standing.check(ticket(at=11), queue, [])
    standing.check(ticket(at=11), waiting(ticket()), [])
    standing.patience.empty(now=12.0)
    standing.check(ticket(at=13), queue, [])


def test_the_pace_of_late_counts_but_an_idle_engine_is_not_held_to_a_stall():
    slow = door(max_wait_s=25)
    for _ in range(200):
        slow.ticked(1, 3.0)
    assert slow.pace == pytest.approx(3.0, rel=0.01)
    drawing = [SimpleNamespace(left=Part(1, 1, 10), images=range(1), ticket=ticket())]
    door(max_wait_s=25).check(ticket(at=1), waiting(ticket()), drawing)
    with pytest.raises(TooBusy, match="would wait 60"):
        slow.check(ticket(at=1), waiting(ticket()), drawing)
    slow.check(ticket(at=1, timeout_s=20), waiting(), [])  # twice its ten ticks


def test_the_queue_has_places_that_are_kept_for_the_urgent():
    queue = waiting(*(ticket() for _ in range(5)))
    for priority, most in (("low", 5), ("normal", 10), ("high", 12)):
        few = door(queue=10, slots=1)
        few.check(ticket(most + 1 - 5, at=1, priority=priority), queue, [])
        with pytest.raises(QueueFull, match=f"but {most} may wait"):
            few.check(ticket(most + 2 - 5, at=1, priority=priority), queue, [])
