"""Pictures asked of a real endpoint under load, drawn again alone: `python -m tests.benchmarks.bench_replay`.

`diffusion run` makes a model, with the demo's network after `--images` pictures, and serves it.  `--clients` clients ask at
once until there are `--pictures` PNGs: every sampler, 2 to 24 steps, each class or none, guided or not, 1 to 4 pictures a
request.  As many other clients make load meanwhile: requests of their own, some wrong, some given up half way.  Then the
endpoint ends, and each PNG is drawn again in this process from its receipt, alone.  Required: the same bytes, all of them.
"""

import argparse
import base64
import os
import signal
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import get_args

import httpx

from diffusion.lineage.replay import Outcome, outcome, redraw, surroundings
from diffusion.recipe import SamplerName
from diffusion.serving.engine import Engine
from diffusion.serving.receipt import opened
from diffusion.store.bundle import load_bundle
from diffusion.store.bundle_spec import bundle_path
from tests.ports import free_port
from tests.program import Place, read_until, running

PATH = "/v1/images/generations"
SETTINGS = ("evaluate.samples=32", "evaluate.loss_pictures=16", "gate.max_loss=10", "serve.queue=1000")


def body_of(random: Random, classes: list[str]) -> dict:
    """A request of any kind."""
    body = {"seed": random.randrange(2**32), "n": random.randint(1, 4), "steps": random.randint(2, 24)}
    if random.random() < 0.8:
        body |= {"label": random.choice(classes), "guidance": random.choice([0, 1, 1.5, 2.5, 7])}
    return body | {"sampler": random.choice(get_args(SamplerName))}


def asked(url: str, classes: list[str], pictures: int, clients: int) -> tuple[list[bytes], int]:
    """That many PNGs of the endpoint, and how many requests of others it had meanwhile."""
    over, others = threading.Event(), []

    def load(number: int) -> None:
        random = Random(f"load {number}")
        while not over.is_set():
            body = body_of(random, classes)
            kind = random.random()
            with suppress(httpx.TimeoutException):
                if kind < 0.1:
                    body["label"] = "no such class"
                httpx.post(url + PATH, json=body, timeout=0.5 if kind > 0.8 else 120)
            others.append(number)

    def ask(body: dict) -> list[bytes]:
        answer = httpx.post(url + PATH, json=body, timeout=300)
        answer.raise_for_status()
        return [base64.b64decode(item["b64_json"]) for item in answer.json()["data"]]

    bodies, random = [], Random(0)
    while sum(body["n"] for body in bodies) < pictures:
        bodies.append(body_of(random, classes))
    with ThreadPoolExecutor(2 * clients) as pool:
        loading = [pool.submit(load, number) for number in range(clients)]
        try:
            found = [png for answer in pool.map(ask, bodies) for png in answer]
        finally:
            over.set()
        for done in loading:
            done.result()
    return found[:pictures], len(others)


def replayed(pngs: list[bytes], store: Path) -> list[Outcome]:
    """Each drawn again, one after the other."""
    engines: dict[str, Engine] = {}
    results = []
    for png in pngs:
        found = opened(png)
        digest = found.receipt.bundle_digest
        if digest not in engines:
            engines[digest] = Engine(load_bundle(bundle_path(store, digest), digest=digest), slots=16)
        engine = engines[digest]
        results.append(outcome(png, found, redraw(found.receipt, engine), surroundings(engine.device)))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=100)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--images", type=int, default=1024, help="pictures that the model has seen")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="br-", dir="/tmp") as folder:  # short: Ray's sockets lie below it
        place, port = Place(Path(folder)), free_port()
        settings = [f"train.images={given.images}", *SETTINGS]
        options = [part for setting in settings for part in ("--set", setting)]
        with running(place, "run", "--preset", "demo", "--port", str(port), *options) as process:
            print(read_until(process, "Ctrl-C"))
            url = f"http://127.0.0.1:{port}"
            classes = httpx.get(f"{url}/v1/models", timeout=60).json()["data"][0]["classes"]
            start = time.monotonic()
            pngs, others = asked(url, classes, given.pictures, given.clients)
            drawing = time.monotonic() - start
            os.killpg(process.pid, signal.SIGINT)
            process.wait(timeout=120)
        start = time.monotonic()
        results = replayed(pngs, place.home / "store")
        drawn_again = time.monotonic() - start
    receipts = [opened(png).receipt for png in pngs]
    kinds = {
        name: len({getattr(r, name) for r in receipts}) for name in ("sampler", "steps", "label", "guidance", "image")
    }
    told = ", ".join(f"{number} values of {name}" for name, number in kinds.items())
    print(
        f"{len(pngs)} pictures of {given.clients} clients beside {others} requests of others in {drawing:.0f} s: {told}"
    )
    same = sum(result.same_bytes for result in results)
    print(f"drawn again alone in {drawn_again:.0f} s: {same} of {len(results)} are the same bytes (limit: all)")
    for words in sorted({result.words() for result in results if not result.same_bytes}):
        print(f"  {words}")
    raise SystemExit(0 if same == len(results) else 1)


if __name__ == "__main__":
    main()
