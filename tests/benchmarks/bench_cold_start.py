"""From `diffusion deploy` to the first picture, and of a new replica: `python -m tests.benchmarks.bench_cold_start`.

A home with a registered model of the demo's network, untrained, is made first.  `diffusion deploy` is then run `--runs`
times, as a person does, and what it says tells its phases; the first picture follows.  Then its replica is killed, and the
time to the next picture counts.  What a replica does by itself is timed in a process of its own, as often: importing,
reading and verifying the bundle, proving its batch sizes and measuring their calls, testing itself.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import httpx

from diffusion.adapters.mlflow_registry import register
from diffusion.adapters.mlflow_runs import recorded
from diffusion.presets import PRESETS
from diffusion.store.refs import ModelRef
from flows.site import Site
from tests.made_run import make_run
from tests.ports import free_port
from tests.processes import command_of, descendants, kill
from tests.program import ROOT, Place, running
from tests.registered_run import FIRST, evaluated

LIMIT_S = 10
PHASES = ("starting Ray", "deploy    looking up", "deploy    loading", "deploy    demo version")
TOLD = (
    "imports",
    "Ray, asking MLflow meanwhile",
    "MLflow's answer",
    "Serve and its replica",
    "address told",
    "first picture",
)
BODY = {"seed": 7, "steps": 4}
REPLICA = """
import json, sys, time
t = [time.monotonic()]
from diffusion.adapters import ray_serve
t.append(time.monotonic())
from diffusion.store.bundle import load_bundle
from diffusion.serving.engine import Engine
from diffusion.recipe import ServeRecipe
bundle = load_bundle(sys.argv[1])
t.append(time.monotonic())
engine = Engine.serving(bundle, ServeRecipe())
t.append(time.monotonic())
engine.self_test()
t.append(time.monotonic())
print(json.dumps([b - a for a, b in zip(t, t[1:])]))
"""
STEPS = ("imports", "reading and verifying the bundle", "proving and measuring batches", "testing itself")


def registered(place: Place) -> ModelRef:
    recipe, site = PRESETS["demo"](), Site(home=place.home)
    site.prepare()
    run = make_run(place.home / "run", recipe.train)
    tracking = site.tracking("demo")
    with recorded(tracking, "train", "c" * 64, recipe.train, run.dataset) as (run_id, log):
        log({"images_seen": run.images_seen, "loss": 0.9})
    evaluation = evaluated(site.store, run.model_copy(update={"mlflow_run_id": run_id}), recipe.evaluate.sampling, 12.0)
    return register(tracking, evaluation, FIRST, "demo", recipe.evaluate)


def first_picture(port: int) -> float:
    """The moment at which there was one."""
    while True:
        try:
            answer = httpx.post(f"http://127.0.0.1:{port}/v1/images/generations", json=BODY, timeout=300)
            if answer.status_code == 200:
                return time.monotonic()
        except httpx.HTTPError:
            pass
        time.sleep(0.05)


def deployed(place: Place) -> tuple[list[float], float]:
    """Seconds of the phases up to the first picture, and from the kill of its replica to the next."""
    port, began = free_port(), time.monotonic()
    with running(place, "deploy", "--port", str(port)) as process:
        at, said = [began], ""
        for line in process.stdout:
            said += line
            if len(at) <= len(PHASES) and PHASES[len(at) - 1] in line:
                at.append(time.monotonic())
            if "Ctrl-C" in line:
                at.append(time.monotonic())
                break
        assert len(at) == len(PHASES) + 2, said
        at.append(first_picture(port))
        (replica,) = [pid for pid in descendants(process.pid) if "ServeReplica:diffusion:images" in command_of(pid)]
        kill(replica)
        killed = time.monotonic()
        again = first_picture(port) - killed
        os.killpg(process.pid, signal.SIGINT)
        process.wait(timeout=120)
    return [b - a for a, b in pairwise(at)], again


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bc-", dir="/tmp") as folder:
        place = Place(Path(folder))
        model = registered(place)
        runs, replicas = [], []
        for _ in range(given.runs):
            runs.append(deployed(place))
            command = [sys.executable, "-c", REPLICA, model.uri]
            environment = place.environment() | {"OMP_NUM_THREADS": "1"}  # as Ray gives a replica of one CPU
            done = subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE)
            replicas.append(json.loads(done.stdout))
    print(
        f"{given.runs} runs, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the end; medians, least to most, in s"
    )
    whole = tell("from `diffusion deploy` to the first picture", TOLD, [phases for phases, _ in runs])
    tell("a replica by itself", STEPS, replicas)
    tell("from a replica's kill to the next picture", (), [[again] for _, again in runs])
    print(f"limit {LIMIT_S} s after the imports: {'reached' if whole < LIMIT_S else 'missed'}")


def tell(what: str, names: tuple[str, ...], found: list[list[float]]) -> float:
    """Returns the median of the whole but for the first phase."""
    totals = sorted(map(sum, found))
    print(f"{what}: {statistics.median(totals):.1f} ({totals[0]:.1f} to {totals[-1]:.1f})")
    for name, times in zip(names, zip(*found, strict=True), strict=bool(names)):
        print(f"  {name:34} {statistics.median(times):5.1f} ({min(times):.1f} to {max(times):.1f})")
    return statistics.median(sum(each[1:]) for each in found)


if __name__ == "__main__":
    main()
