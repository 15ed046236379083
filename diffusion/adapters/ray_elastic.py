"""Ray Train between two numbers of workers: of those that the cluster has room for, the largest that the batch allows.

Ray Train itself would take any number in between, and a batch of 12 cannot be divided over five workers.
"""

from types import SimpleNamespace
from typing import Any

import ray
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy


class Fitting(ElasticScalingPolicy):
    """Ray Train's own policy, its count of workers rounded down to one of `worlds`, its reservation that of `run`."""

    def __init__(self, scaling_config: ScalingConfig, worlds: tuple[int, ...], run: str) -> None:
        super().__init__(scaling_config)
        self.worlds, self.run = worlds, run

    def after_controller_start(self, train_run_context: Any) -> None:
        # what a killed driver reserved stays so for three minutes: under the same name, the next one has it at once
        super().after_controller_start(SimpleNamespace(run_id=self.run))

    def _count_possible_workers(self, reserved_resources: dict[str, dict[str, float]]) -> int:
        # what is reserved is looked at every 20 s: a start on a node that has died since would wait for a minute
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        room = super()._count_possible_workers({node: has for node, has in reserved_resources.items() if node in alive})
        return max((world for world in self.worlds if world <= room), default=0)


class ElasticTrainer(TorchTrainer):
    """A TorchTrainer: its ScalingConfig has the least and the most of `worlds`.  run: a name that a later driver has too."""

    def __init__(self, *args: Any, worlds: tuple[int, ...], run: str, **config: Any) -> None:
        super().__init__(*args, **config)
        self.worlds, self.run = worlds, run

    def _initialize_and_run_controller(self, **settings: Any) -> Any:
        policy = Fitting(self.scaling_config, self.worlds, self.run)
        return super()._initialize_and_run_controller(**settings | {"scaling_policy": policy})
