"""How many replicas Ray Serve keeps, of what size, and how they come and go."""

import math

from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

from diffusion.recipe import ServeRecipe

FILL = "fill"  # of a replica's slots: 1 where all are taken and nothing waits, 3 where twice as many pictures wait
PROVED_EVERY_S = 10.0  # four evaluations each time
_UPSCALE_S, _LOOK_BACK_S = 5.0, 12.0
_AT_ONCE = 4_096  # requests in a replica whose bodies are read, that are refused, or that draw nothing

Replicas = int | tuple[int, int]  # so many, or the least and the most


def options(replicas: Replicas, cpus: float, gpus: float, idle_s: float, limits: ServeRecipe) -> dict:
    """Options of the deployment.  As `diffusion.adapters.ray_serve.deploy` has them."""
    return _number(replicas, idle_s) | {
        "ray_actor_options": {"num_cpus": cpus, "num_gpus": gpus},
        # the engine refuses with Retry-After; Serve is to let everything through to it, past bodies that do not come
        "max_ongoing_requests": limits.queue + _AT_ONCE,
        "max_surge_percent": 100,
        "max_constructor_retry_count": 2,
        "graceful_shutdown_timeout_s": limits.timeout_s,
        "graceful_shutdown_wait_loop_s": 0.5,
        "health_check_period_s": 2,  # it is replaced when it has failed three
        "health_check_timeout_s": 30,
    }


def least(replicas: Replicas) -> int:
    """How many there are at once."""
    return replicas if isinstance(replicas, int) else replicas[0]


def enough(context: AutoscalingContext) -> tuple[int, dict]:
    """So many replicas that all pictures which are drawn and wait would have a slot.  Serve's controller asks this; it knows
    the bounds, and waits until the answer has been another for a while.
    """
    fills = (context.aggregated_metrics or {}).get(FILL)
    if not fills:  # no replica has told of itself yet
        return context.target_num_replicas, {}
    return max(1, math.ceil(sum(fills.values()))), {}


def _number(replicas: Replicas, idle_s: float) -> dict:
    if isinstance(replicas, int) or replicas[0] == replicas[1]:
        return {"num_replicas": least(replicas)}
    scaled = AutoscalingConfig(
        min_replicas=replicas[0],
        max_replicas=replicas[1],
        upscale_delay_s=_UPSCALE_S,
        downscale_delay_s=idle_s,
        look_back_period_s=_LOOK_BACK_S,
        policy=AutoscalingPolicy(policy_function=enough),
    )
    return {"num_replicas": None, "autoscaling_config": scaled}
