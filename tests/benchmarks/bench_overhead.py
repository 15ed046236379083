"""What HTTP and Ray Serve cost a request above the engine: `python -m tests.benchmarks.bench_overhead`.

One picture of a tiny random network in two steps, by one client that asks again when it is answered, in turns of

engine  submitted to an engine in this process, and waited for
app     POST /v1/images/generations of the application in uvicorn, a process of its own
serve   the same behind Ray Serve's proxy, one replica

Each turn asks each of them `--requests` times, in an order that changes.  A difference is that of two medians of one turn;
told is its median over the turns, and the least and the largest.  Required: serve at most 10 ms above the engine.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import torch
import uvicorn

from diffusion.adapters.http import create_app
from diffusion.adapters.ray_cluster import local_ray
from diffusion.adapters.ray_serve import deploy
from diffusion.recipe import ServeRecipe
from diffusion.serving.engine import Engine
from diffusion.serving.held import Bundles
from diffusion.serving.lineup import Lineup
from diffusion.serving.request import GenerateRequest, resolve
from diffusion.serving.shelf import Shelf
from diffusion.store.bundle import load_bundle
from diffusion.store.refs import ModelRef
from tests.ports import free_port
from tests.random_bundle import published_model

LIMIT_MS = 10
BODY = {"label": "cat", "seed": 1, "steps": 2, "guidance": 1}
LIMITS = ServeRecipe(slots=4)


def serve_app(model: ModelRef, port: int) -> None:
    """The application in this process, until it is ended."""
    shelf = Shelf(Bundles(LIMITS))
    shelf.change(Lineup(models=(model,)))
    uvicorn.run(create_app(shelf, LIMITS), host="127.0.0.1", port=port, log_level="critical")


def by_http(port: int) -> Callable[[], None]:
    client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120)

    def ask() -> None:
        client.post("/v1/images/generations", json=BODY).raise_for_status()

    return ask


def by_engine(model: ModelRef) -> Callable[[], None]:
    engine = Engine.serving(load_bundle(model.uri), LIMITS)
    engine.start()
    request = resolve(GenerateRequest(**BODY), engine.bundle.spec)
    return lambda: engine.submit(engine.job(request)).future.result()


def until_it_answers(ask: Callable[[], None]) -> None:
    deadline = time.monotonic() + 120
    while True:
        try:
            return ask()
        except httpx.HTTPError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def milliseconds(ask: Callable[[], None], requests: int) -> list[float]:
    """Of each request, in order of size."""
    found = []
    for _ in range(requests):
        began = time.perf_counter()
        ask()
        found.append(1000 * (time.perf_counter() - began))
    return sorted(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--requests", type=int, default=20)
    parser.add_argument("--app", nargs=2, metavar=("MODEL", "PORT"), help=argparse.SUPPRESS)  # the process of `app`
    given = parser.parse_args()
    torch.set_num_threads(1)  # as Ray gives a replica of one CPU
    if given.app:
        serve_app(ModelRef.model_validate_json(given.app[0]), int(given.app[1]))
        return
    with tempfile.TemporaryDirectory(prefix="bo-", dir="/tmp") as name, local_ray(Path(name, "ray"), cpus=2):
        model, ports = published_model(Path(name, "store")), (free_port(), free_port())
        command = [
            sys.executable,
            "-m",
            "tests.benchmarks.bench_overhead",
            "--app",
            model.model_dump_json(),
            str(ports[0]),
        ]
        with subprocess.Popen(command) as app:
            try:
                deploy(model, LIMITS, port=ports[1])
                asked = {"engine": by_engine(model), "app": by_http(ports[0]), "serve": by_http(ports[1])}
                for ask in asked.values():
                    until_it_answers(ask)
                    milliseconds(ask, given.requests)
                turns: dict[str, list[list[float]]] = {name: [] for name in asked}
                names = list(asked)
                for turn in range(given.turns):
                    for name in names[turn % 3 :] + names[: turn % 3]:
                        turns[name].append(milliseconds(asked[name], given.requests))
            finally:
                app.terminate()
    load = os.getloadavg()[0]
    print(f"{given.turns} turns of {given.requests} requests, {os.cpu_count()} cores, load {load:.1f} at the end")
    for name, found in turns.items():
        every = sorted(ms for turn in found for ms in turn)
        p50, p95 = (every[int(len(every) * share)] for share in (0.5, 0.95))
        print(f"{name:7} p50 {p50:6.1f} ms, p95 {p95:6.1f} ms")
    above = {}
    for name in ("app", "serve"):
        pairs = zip(turns[name], turns["engine"], strict=True)
        differences = sorted(statistics.median(a) - statistics.median(b) for a, b in pairs)
        above[name] = statistics.median(differences)
        print(f"{name:7} above the engine {above[name]:5.1f} ms ({differences[0]:.1f} to {differences[-1]:.1f})")
    print(f"limit {LIMIT_MS} ms: {'reached' if above['serve'] < LIMIT_MS else 'missed'}")
    raise SystemExit(0 if above["serve"] < LIMIT_MS else 1)


if __name__ == "__main__":
    main()
