"""A model changed under load, over and over: `python -m tests.benchmarks.bench_swap`.

The application behind a real server, its shelf offering one of two bundles of a preset's network.  --clients clients ask for
pictures of mixed lengths without a pause, --swaps times the other bundle is offered while they do, and at three moments a
damaged one.  Required: every request is answered with pictures; each picture's receipt names one bundle, with which it is
drawn again alone to the same bytes (--replay of them, 0 for all); each damaged bundle is refused and the old goes on; the
99th of 100 requests during a change takes at most twice as long as between changes; memory does not grow.

Each client asks for the next picture --think seconds after it has one.  A request counts as during a change if it was under
way at any time between the offer and the moment at which the old engine is gone.
"""

import argparse
import base64
import itertools
import statistics
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from random import Random

import httpx
import torch

from diffusion.adapters.http import create_app
from diffusion.lineage.replay import redraw
from diffusion.recipe import ServeRecipe
from diffusion.serving.held import Bundles
from diffusion.serving.lineup import Lineup
from diffusion.serving.receipt import Opened, opened, stamp
from diffusion.serving.shelf import MIB, Refused, Shelf
from diffusion.store.refs import ModelRef
from tests.benchmarks.bench_serving import bundle_of
from tests.integration.test_http import URL, answering
from tests.random_bundle import published_model

LIMITS = ServeRecipe(slots=16, queue=1_000, timeout_s=600, max_wait_s=600)
STEPS = (10, 20, 50)
ROOM = 1_024 * MIB


@dataclass
class Asked:
    """A request that is over: when it began and ended, by time.monotonic(), its status and its PNG."""

    began: float
    ended: float
    status: int
    png: bytes


@dataclass
class Told:
    """What came of the load."""

    asked: list[Asked]
    changes: list[tuple[float, float]]  # began, and the old engine was gone
    refused: int  # damaged bundles
    memory: list[int]  # bytes after each change

    def times(self) -> tuple[list[float], list[float]]:
        """Seconds of requests between changes and during one."""
        between, during = [], []
        for each in self.asked:
            within = any(each.began < end and start < each.ended for start, end in self.changes)
            (during if within else between).append(each.ended - each.began)
        return between, during


def damaged(store: Path, whole: ModelRef, number: int) -> ModelRef:
    """A published copy of the bundle, one bit of its weights turned over since."""
    folder = store / f"damaged-{number}"
    folder.mkdir()
    for file in Path(whole.uri).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = folder / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1 - number] ^= 1
    weights.write_bytes(data)
    return whole.model_copy(update={"uri": str(folder), "version": f"broken-{number}"})


def anonymous() -> int:
    """Bytes of this process's memory that are no file's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def under_load(
    models: list[ModelRef],
    broken: list[ModelRef],
    *,
    swaps: int,
    clients: int,
    think_s: float,
    steps: tuple[int, ...],
    label: str,
    pause_s: float,
    limits: ServeRecipe = LIMITS,
) -> Told:
    """Clients ask, and meanwhile the models take turns, a broken one among them at even distances."""
    shelf, over, asked = Shelf(Bundles(limits), room=ROOM), threading.Event(), []
    told = Told(asked, [], 0, [])
    shelf.change(Lineup(models=models[:1]))

    def ask(client: httpx.Client, number: int) -> None:
        random = Random(f"client {number}")
        while not over.is_set():
            body = {"label": label, "seed": random.randrange(2**32), "steps": random.choice(steps)}
            body |= {"sampler": "ddim", "guidance": random.choice((1, 2))}
            began = time.monotonic()
            answer = client.post(URL, json=body)
            png = base64.b64decode(answer.json()["data"][0]["b64_json"]) if answer.status_code == 200 else b""
            asked.append(Asked(began, time.monotonic(), answer.status_code, png))
            over.wait(random.expovariate(1 / think_s) if think_s else 0)

    def change() -> None:
        others = itertools.cycle([*models[1:], models[0]])
        breaks = {(i + 1) * swaps // (len(broken) + 1): bad for i, bad in enumerate(broken)}
        time.sleep(pause_s)
        for number in range(swaps):
            if number in breaks:
                present = shelf.lineup
                try:
                    shelf.change(Lineup(models=(breaks[number],)))
                except Refused:
                    told.refused += shelf.lineup == present
            began = time.monotonic()
            shelf.change(Lineup(models=(next(others),)))
            while len(shelf.held()) > 1:
                time.sleep(0.005)
            told.changes.append((began, time.monotonic()))
            time.sleep(pause_s)
            told.memory.append(anonymous())

    with answering(create_app(shelf, limits)) as client, ThreadPoolExecutor(clients) as pool:
        asking = [pool.submit(ask, client, number) for number in range(clients)]
        try:
            change()
        finally:
            over.set()
        for each in asking:
            each.result()
    shelf.close()
    return told


def mixed(told: Told, models: list[ModelRef], most: int, limits: ServeRecipe = LIMITS) -> tuple[int, int]:
    """(replayed, not the same bytes) of pictures drawn again alone by the bundle that their receipt names; those that were
    under way during a change first.  most: so many, 0 for all."""
    engines = {model.digest: Bundles(limits).open(model) for model in models}
    of_changes = [
        each for each in told.asked if any(each.began < end and start < each.ended for start, end in told.changes)
    ]
    first = {id(each) for each in of_changes}
    pngs = [each.png for each in (*of_changes, *(each for each in told.asked if id(each) not in first)) if each.png]
    pngs = pngs[: most or None]

    def same(found: Opened, png: bytes) -> bool:
        return stamp(redraw(found.receipt, engines[found.receipt.bundle_digest]), found.receipt) == png

    return len(pngs), sum(not same(opened(png), png) for png in pngs)


def p99(seconds: list[float]) -> float:
    return statistics.quantiles(seconds, n=100)[98]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--swaps", type=int, default=50)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--think", type=float, default=0.5)
    parser.add_argument("--pause", type=float, default=4.0, help="seconds between changes")
    parser.add_argument("--replay", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder)
        models = []
        for number in range(2):
            bundle = bundle_of(given.preset)
            with torch.no_grad():
                next(bundle.denoiser.parameters()).mul_(1 + number)
            models.append(published_model(store, seed=number, version=str(number + 1), bundle=bundle))
        broken = [damaged(store, models[0], number) for number in range(3)]
        begun = time.monotonic()
        told = under_load(
            models,
            broken,
            swaps=given.swaps,
            clients=given.clients,
            think_s=given.think,
            steps=STEPS,
            label="a",
            pause_s=given.pause,
        )
        whole = time.monotonic() - begun
        replayed, others = mixed(told, models, given.replay)
    failed = sum(each.status != 200 for each in told.asked)
    between, during = told.times()
    lengths = [end - start for start, end in told.changes]
    print(f"{len(told.asked)} requests of {given.clients} clients in {whole:.0f} s; failed: {failed} (0)")
    print(f"drawn again alone by the bundle of the receipt: {replayed}, other bytes: {others} (0)")
    print(f"damaged bundles refused while the old went on: {told.refused} of {len(broken)} ({len(broken)})")
    print(f"{given.swaps} changes, each {statistics.median(lengths):.2f} s, at most {max(lengths):.2f} s")
    for name, seconds in (("between", between), ("during", during)):
        print(f"{name}: {len(seconds)} requests, p50 {statistics.median(seconds):.3f} s, p99 {p99(seconds):.3f} s")
    print(f"p99 during over between: {p99(during) / p99(between):.2f} (2)")
    memory = [each / MIB for each in told.memory]
    tenth = max(1, len(memory) // 10)
    grown = statistics.median(memory[-tenth:]) - statistics.median(memory[tenth : 2 * tenth])
    print(
        f"memory after the second tenth of the changes and in the last: grown {grown:.1f} MiB, at most {max(memory):.0f}"
    )


if __name__ == "__main__":
    main()
