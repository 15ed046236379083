"""Models that take turns while an endpoint is asked: the short form of tests/benchmarks/bench_swap.py."""

import pytest

from diffusion.recipe import ServeRecipe
from tests.benchmarks.bench_swap import damaged, mixed, under_load
from tests.random_bundle import published_model

LIMITS = ServeRecipe(slots=4, queue=100, timeout_s=300, max_wait_s=300)


@pytest.mark.slow
def test_no_request_fails_and_no_picture_is_of_two_models(one_thread, tmp_path) -> None:
    models = [published_model(tmp_path, seed=i, version=str(i + 1)) for i in range(2)]
    told = under_load(
        models,
        [damaged(tmp_path, models[0], 0)],
        swaps=4,
        clients=3,
        think_s=0,
        steps=(3, 12),
        label="cat",
        pause_s=0.1,
        limits=LIMITS,
    )
    assert {each.status for each in told.asked} == {200}
    assert (len(told.changes), told.refused) == (4, 1)
    replayed, others = mixed(told, models, 40, LIMITS)
    assert replayed > 10
    assert others == 0
