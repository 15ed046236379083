"""Whose turn it is: laws of the queue."""

from types import SimpleNamespace

from hypothesis import given
from hypothesis import strategies as st

from diffusion.serving.admission import STANDS_BACK_S, Admission
from diffusion.serving.priority import PRIORITIES
from diffusion.serving.ticket import Ticket

ARRIVALS = st.lists(
    st.tuples(st.floats(0, 20, width=32), st.sampled_from(PRIORITIES), st.integers(1, 4)), min_size=1, max_size=40
)


def ticket(submitted_at: float, priority: str = "normal", n: int = 1, rows: int = 1) -> Ticket:
    job = SimpleNamespace(request=SimpleNamespace(n=n), rows=rows)
    return Ticket(job, priority=priority, submitted_at=submitted_at)


def taken(gaps, free: int) -> list[Ticket]:
    """The order in which pictures have their slots: one round of `free` slots after each arrival, then until all have."""
    queue, now, order = Admission(), 0.0, []

    def round_of() -> bool:
        left = free
        while turn := queue.take(left):
            left -= len(turn[1])
            order.extend([turn[0]] * len(turn[1]))
        return left < free

    for gap, priority, n in gaps:
        now += gap
        queue.add(ticket(now, priority, n))
        round_of()
    while round_of():
        pass
    return order


@given(ARRIVALS, st.integers(1, 3))
def test_one_is_passed_only_by_those_who_come_soon_after_it(gaps, free):
    order = taken(gaps, free)
    assert sorted(map(id, order)) == sorted(id(one) for one in dict.fromkeys(order) for _ in range(one.request.n))
    assert len(order) == sum(n for _, _, n in gaps)
    for place, one in enumerate(order):
        for before in order[:place]:
            later = before.submitted_at - one.submitted_at
            assert later <= max(0.0, STANDS_BACK_S[one.priority] - STANDS_BACK_S[before.priority])


@given(ARRIVALS)
def test_those_of_one_priority_have_their_turns_as_they_came(gaps):
    order = taken([(gap, "normal", n) for gap, _, n in gaps], 2)
    assert [one.submitted_at for one in order] == sorted(one.submitted_at for one in order)


def test_an_endless_stream_of_urgent_requests_starves_nobody():
    queue, patient = Admission(), ticket(0.0, "low")
    queue.add(patient)
    for second in range(int(STANDS_BACK_S["low"]) + 1):  # one slot a second, and somebody urgent for each
        queue.add(ticket(float(second), "high"))
        if queue.take(1)[0] is patient:
            return
    raise AssertionError("it never had its turn")


def test_the_urgent_go_first_and_no_picture_is_given_twice():
    queue = Admission()
    low, normal, high = (ticket(0.0, priority, 3) for priority in ("low", "normal", "high"))
    for one in (low, normal, high):
        queue.add(one)
    assert queue.pictures == 9
    turns = [queue.take(2) for _ in range(6)]
    assert turns == [(one, part) for one in (high, normal, low) for part in (range(2), range(2, 3))]
    assert queue.take(2) is None
    assert queue.pictures == 0
    assert not queue


def test_pictures_of_two_rows_need_room_for_both_and_are_not_passed():
    queue = Admission()
    guided, plain = ticket(0.0, n=3, rows=2), ticket(1.0)
    queue.add(guided)
    queue.add(plain)
    assert queue.take(8, 5) == (guided, range(2))
    assert queue.take(6, 1) is None  # though the other has room
    assert queue.take(6, 2) == (guided, range(2, 3))
    assert queue.take(5, 1) == (plain, range(1))


def test_what_is_over_is_forgotten():
    queue, one, other = Admission(), ticket(0.0), ticket(1.0)
    queue.add(one)
    queue.add(other)
    one.cancel()
    assert queue.pictures == 1
    queue.drop_ended()
    assert queue.take(5) == (other, range(1))
