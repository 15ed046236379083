import math
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray import serve

from diffusion.adapters.ray_serve_replicas import FILL, enough, options
from diffusion.recipe import ServeRecipe

LIMITS = ServeRecipe(slots=4, queue=32, timeout_s=20)


def asked(fills: dict[str, float] | None, target: int) -> int:
    metrics = None if fills is None else {FILL: fills}
    return enough(SimpleNamespace(aggregated_metrics=metrics, target_num_replicas=target))[0]


@given(st.lists(st.floats(0, 100), min_size=1, max_size=8))
def test_so_many_replicas_have_slots_for_all_pictures_and_one_less_has_not(fills):
    number = asked(dict(enumerate(fills)), target=1)
    assert sum(fills) <= number
    assert number == 1 or sum(fills) > number - 1


def test_without_a_word_of_the_replicas_their_number_stays():
    assert asked(None, 3) == asked({}, 3) == 3
    assert asked({"a": 0.0}, 3) == 1


@serve.deployment
class Nothing:
    pass


@pytest.mark.parametrize("gpus", [0, 0.5, 2])
def test_serve_takes_what_a_replica_is_to_have(gpus):
    made = Nothing.options(**options(2, 0.25, gpus, 60, LIMITS))
    assert made.num_replicas == 2
    assert made.ray_actor_options == {"num_cpus": 0.25, "num_gpus": gpus}
    assert made.max_ongoing_requests > 4 + 32
    assert made._deployment_config.autoscaling_config is None
    assert math.isclose(made._deployment_config.graceful_shutdown_timeout_s, 20)


def test_serve_takes_the_least_and_the_most():
    scaled = Nothing.options(**options((1, 4), 1, 0.5, 30, LIMITS))._deployment_config.autoscaling_config
    assert (scaled.min_replicas, scaled.max_replicas, scaled.downscale_delay_s) == (1, 4, 30)
    assert scaled.policy.get_policy().__code__ == enough.__code__
    assert Nothing.options(**options((3, 3), 1, 0, 30, LIMITS)).num_replicas == 3
