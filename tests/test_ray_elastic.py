"""adapters/ray_elastic.py: which numbers of workers are taken.  A cluster that grows and shrinks is bench_kills."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from ray.train import ScalingConfig

from diffusion.adapters import ray_elastic
from diffusion.adapters.ray_elastic import Fitting
from diffusion.adapters.ray_train import _resized
from diffusion.recipe import TrainRecipe
from diffusion.training.exact import worlds_of
from diffusion.training.journal import Journal

PLAIN = TrainRecipe(batch_size=12, images=120)
EXACT = TrainRecipe(batch_size=12, images=120, micro_batch=1)  # twelve parts: three workers of 4, six of 2, twelve of 1


def test_only_worlds_that_divide_the_batch_are_taken():
    assert worlds_of(PLAIN, (2, 8)) == (2, 3, 4, 6)
    assert worlds_of(PLAIN, 4) == (4,)
    assert worlds_of(EXACT, (2, 8)) == (3, 6)
    with pytest.raises(
        ValueError, match="no number of workers from 7 to 11 divides batch_size=12: let there be 1 or 2 or"
    ):
        worlds_of(PLAIN, (7, 11))
    with pytest.raises(ValueError, match="micro_batch=1: let there be 1 or 3 or 6 or 12"):
        worlds_of(EXACT, (4, 5))
    with pytest.raises(ValueError, match="cannot be divided over 5 workers"):
        worlds_of(PLAIN, 5)


@pytest.mark.parametrize(
    ("cpus", "dead", "world"), [([8], [], 6), ([5], [], 4), ([2, 3], [], 4), ([2, 3], [1], 2), ([3, 1], [0], 0)]
)
def test_the_largest_world_that_living_nodes_have_room_for(
    cpus: list[int], dead: list[int], world: int, monkeypatch: pytest.MonkeyPatch
):
    nodes = [{"NodeID": str(i), "Alive": i not in dead} for i in range(len(cpus))]
    monkeypatch.setattr(ray_elastic.ray, "nodes", lambda: nodes)
    policy = Fitting(ScalingConfig(num_workers=(2, 6)), (2, 3, 4, 6), "run")
    reserved = {str(i): {"CPU": float(n)} for i, n in enumerate(cpus)}
    assert policy._count_possible_workers(reserved) == world


def test_the_next_driver_of_a_run_takes_over_what_the_killed_one_reserved(monkeypatch: pytest.MonkeyPatch):
    asked: list[str] = []
    monkeypatch.setattr(Fitting, "_send_resource_request", lambda policy: asked.append(policy._requester_id))
    for driver in ("killed", "next"):
        Fitting(ScalingConfig(num_workers=(2, 6)), (2, 6), "run").after_controller_start(SimpleNamespace(run_id=driver))
    assert asked[0] == asked[1]


def test_a_start_on_another_number_of_workers_is_told_also_by_the_next_driver(tmp_path: Path):
    journal = Journal(tmp_path / "metrics.jsonl")
    assert _resized(journal.world, {"event": "started", "images_seen": 0, "world": 2}) == []
    journal.event({"event": "started", "images_seen": 0, "world": 2})
    journal.event({"event": "checkpoint", "images_seen": 8})
    journal = Journal(tmp_path / "metrics.jsonl")
    resumed = {"event": "resumed", "images_seen": 8, "world": 4}
    assert _resized(journal.world, resumed) == [{"event": "resized", "from": 2, "to": 4, "images_seen": 8}]
    assert _resized(journal.world, resumed | {"world": 2}) == []
    assert _resized(journal.world, {"event": "checkpoint", "images_seen": 16}) == []
