import pytest
import torch

from diffusion.sampler import Query
from diffusion.serving.ladder import REFERENCE, Ladder, NotReproducible, prove


def draw(rows: int, trial: int) -> Query:
    generator = torch.Generator().manual_seed(trial)
    return Query(
        torch.randn(rows, 3, 4, 4, generator=generator),
        torch.rand(rows, generator=generator) + 0.1,
        {"label": torch.arange(rows) % 3},
    )


def honest(x, sigma, label):
    return x / sigma.view(-1, 1, 1, 1) + label.view(-1, 1, 1, 1)


def test_every_size_is_kept_where_rows_are_independent():
    assert prove(honest, draw, largest=16).sizes == (2, 4, 8, 16)


def test_what_one_row_rounds_differently_so_seldom_that_no_trial_sees_it_is_never_served():
    """As the matrix-vector kernels of CPUs do in bf16."""

    def seldom(x, sigma, label):
        return honest(x, sigma, label) * (1 + 2e-7 * (len(x) == 1 and float(sigma[0]) > 5))

    ladder, query = prove(seldom, draw, largest=16), draw(1, 0)._replace(sigma=torch.tensor([6.0]))
    assert torch.equal(ladder.answer(seldom, query), honest(query.x, query.sigma, **query.cond))


def test_sizes_that_give_other_bits_are_dropped():
    def wavering(x, sigma, label):
        return honest(x, sigma, label) * (1 + 2e-7 * (len(x) in (2, 4)))

    assert prove(wavering, draw, largest=16).sizes == (8, 16)


def test_rows_that_depend_on_their_neighbours_go_one_by_one():
    def mixing(x, sigma, label):
        return honest(x, sigma, label) + 1e-6 * x.mean()

    assert prove(mixing, draw, largest=16).sizes == (1,)


def test_a_network_that_never_repeats_itself_is_refused():
    calls = iter(range(10**6))
    with pytest.raises(NotReproducible, match="other bits"):
        prove(lambda x, sigma, label: x + next(calls), draw, largest=4)


def test_the_reference_size_is_tried_on_the_smallest_server_too():
    assert REFERENCE in prove(honest, draw, largest=1).sizes


def test_plans_hold_the_rows_at_the_least_cost():
    ladder = Ladder((1, 4, 16), {1: 1.0, 4: 2.0, 16: 9.0})
    assert ladder.plan(1) == [1]
    assert ladder.plan(3) == [4]
    assert ladder.plan(5) == [4, 1]
    assert ladder.plan(16) == [4, 4, 4, 4]  # cheaper here than the one call of 16
    for rows in range(1, 70):
        plan = ladder.plan(rows)
        assert sum(plan) >= rows > sum(plan[:-1])


def test_answers_come_back_in_order_whatever_the_plan():
    query = draw(13, 0)
    for sizes in [(8,), (1,), (2, 8), (1, 2, 4, 8, 16)]:
        ladder = Ladder(sizes, {size: 1.0 + size for size in sizes})
        assert torch.equal(ladder.answer(honest, query), honest(query.x, query.sigma, **query.cond))


def test_the_knee_is_where_larger_calls_gain_little():
    flat = {2: 1.0, 4: 1.0, 8: 1.0, 16: 1.0}
    assert Ladder((2, 4, 8, 16), flat).knee == 16
    assert Ladder((2, 4, 8, 16), {2: 0.009, 4: 0.0125, 8: 0.0194, 16: 0.039}).knee == 8  # a CPU's
    assert Ladder((2, 4, 8, 16), {size: size * 1.0 for size in flat}).knee == 2
    assert Ladder((1,), {1: 1.0}).knee == 1
