"""What is killed of a run, when, and how the run is watched meanwhile: of bench_kills."""

import json
import random
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

from diffusion.recipe import TrainRecipe
from diffusion.store.publish import PREFIX
from diffusion.training.figures import FIGURES
from tests.processes import descendants, kill
from tests.test_loop import CLOCKS

TIMEOUT_S = 500


class Run:
    """What the folder of a run tells from outside."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def records(self) -> list[dict]:
        try:
            text = (self.folder / "metrics.jsonl").read_text()
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def events(self, *names: str) -> list[dict]:
        return [record for record in self.records() if record.get("event") in names]

    @property
    def starts(self) -> list[dict]:
        return self.events("started", "resumed")

    @property
    def images_seen(self) -> int:
        return max((record["images_seen"] for record in self.records() if "event" not in record), default=0)

    def numbers(self) -> list[dict]:
        told = [record for record in self.records() if "event" not in record]
        return [
            {name: value for name, value in record.items() if name not in (*CLOCKS, *FIGURES, "time")}
            for record in told
        ]

    def being_written(self) -> set[str]:
        return {path.name for path in (self.folder / "checkpoints").glob(PREFIX + "*")}


def until(happened: Callable[[], bool], what: str, *, every_s: float = 0.05) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not happened():
        if time.monotonic() > deadline:
            raise TimeoutError(what)
        time.sleep(every_s)


@contextmanager
def cluster_of(nodes: int) -> Iterator[Cluster]:
    """A Ray with a head that has no CPU, and so many nodes with one; this process is connected to it."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for _ in range(nodes):
            cluster.add_node(num_cpus=1)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def kill_node(cluster: Cluster, worker: int) -> int:
    """Kill the node that a worker is on, with all that runs there, and add another.  Returns how many processes died."""
    raylets = {node.all_processes["raylet"][0].process.pid: node for node in cluster.worker_nodes}
    raylet = next((pid for pid in raylets if worker in descendants(pid)), None)
    if raylet is None:
        return 0
    hit = kill(raylet, *descendants(raylet))
    cluster.remove_node(raylets[raylet], allow_graceful=False)
    cluster.add_node(num_cpus=1)
    return hit


class Killer:
    """Waits for the moments of a run and kills at each."""

    def __init__(self, run: Run, recipe: TrainRecipe, moments: int, seed: int, hit: Callable[[int], int]) -> None:
        """hit: given one of the run's workers, kills something and returns how many processes that were."""
        self.run, self.draw, self.hit = run, random.Random(seed), hit
        self.moments = sorted(self.draw.randrange(recipe.images * 9 // 10) for _ in range(moments))
        self.kills = self.aimed = self.half_written = 0
        self._starts = 0  # when it killed last

    def strike(self, number: int, over: Callable[[], bool]) -> None:
        """Wait for a moment and kill, unless the run is over before."""
        starts: list[dict] = []

        def due() -> bool:
            nonlocal starts
            starts = self.run.starts
            return over() or (len(starts) > self._starts and self.run.images_seen >= self.moments[number])

        until(due, f"moment {number} of {self.run.folder}")
        aimed = number % 2 == 1
        before = self.run.being_written()
        if aimed:
            until(lambda: over() or bool(self.run.being_written() - before), "a checkpoint", every_s=0.0002)
        else:
            time.sleep(self.draw.random() / 2)
        if over():
            return
        pids = starts[-1]["pids"]
        if self.hit(pids[0] if aimed else self.draw.choice(pids)):
            self.kills += 1
            self.aimed += aimed
        self._starts = len(starts)
        time.sleep(0.3)  # a writer that lives on has published it by then
        self.half_written += bool(self.run.being_written() - before)


def with_kills(train: Callable[[], Any], killer: Killer) -> None:
    """Train in a thread and kill what it trains on at each moment."""
    with ThreadPoolExecutor(1) as pool:
        trained = pool.submit(train)
        for number in range(len(killer.moments)):
            killer.strike(number, trained.done)
        trained.result()


class Driver:
    """A process that trains, and is started again whenever it was killed."""

    def __init__(self, command: list[str]) -> None:
        self.command = command
        self.process = self._started()

    def _started(self) -> subprocess.Popen:
        return subprocess.Popen(self.command, stdout=subprocess.DEVNULL, start_new_session=True)

    def over(self) -> bool:
        return self.process.poll() is not None

    def kill(self, *more: int) -> int:
        hit = kill(self.process.pid, *more)
        self.process.wait()
        self.process = self._started()
        return hit

    def kill_all(self) -> int:
        return self.kill(*descendants(self.process.pid))
