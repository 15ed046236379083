"""The endpoint beside a server written with diffusers, over HTTP: `python -m tests.benchmarks.bench_diffusers_server`.

Requests for one picture of 10, 20 or 50 DDIM steps, guided or not, the same for every contender, which each run in a process
of their own with --threads threads:

ours      the application of `diffusion deploy` around the engine, in uvicorn
locked    FastAPI around diffusers' UNet2DModel and DDIMScheduler as their examples have it: one request after the other
static    the same, but up to --slots requests that came within 10 ms run together until the longest of them is done

Their network has the FLOPs of ours (`bench_train_step.peer_net`), in bfloat16 as ours is, channels last; the weights of both
are random.  Saturation: --requests are sent at once.  Load: they come at random (a Poisson process) at shares of ours'
saturated rate, and the time from when a request was due to its last byte counts.  The contenders take turns, and only one
draws at a time.  Generation only: diffusers has no pipeline of an unconditional network for the other tasks.
"""

import argparse
import asyncio
import multiprocessing
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import httpx
import numpy as np
import torch
import uvicorn

from diffusion.adapters.http import create_app
from diffusion.recipe import ServeRecipe
from diffusion.serving.engine import Engine
from tests.benchmarks.bench_serving import LOADS, STEPS, WAIT_S, arrivals_of, bundle_of
from tests.benchmarks.bench_train_step import forward_flops, peer_net
from tests.integration.test_http import MODEL
from tests.ports import free_port
from tests.running_engine import shelved

URL = "/v1/images/generations"
LEVELS = 3  # of their network: attention at 8 x 8, as ours


def ours(port: int, arguments: argparse.Namespace) -> None:
    """Serve until killed."""
    torch.set_num_threads(arguments.threads)
    limits = ServeRecipe(queue=10_000, max_wait_s=10_000, timeout_s=10_000)
    with shelved(Engine(bundle_of(arguments.preset), slots="auto", queue=limits.queue), MODEL) as shelf:
        uvicorn.run(create_app(shelf, limits), host="127.0.0.1", port=port, log_level="critical")


def theirs(port: int, arguments: argparse.Namespace, config: dict, slots: int) -> None:
    """Serve until killed.  slots: pictures of a batch; 1 is one request after the other."""
    from diffusers import UNet2DModel
    from fastapi import FastAPI, Response

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    net = UNet2DModel.from_config(config).to(memory_format=torch.channels_last).eval().requires_grad_(False)
    side = config["sample_size"]
    app, queue = FastAPI(), asyncio.Queue[tuple[dict, asyncio.Future]]()

    async def work() -> None:
        while True:
            batch = [await queue.get()]
            until = time.monotonic() + WAIT_S
            while len(batch) < slots and (left := until - time.monotonic()) > 0:
                try:
                    batch.append(await asyncio.wait_for(queue.get(), left))
                except TimeoutError:
                    break
            pictures = await asyncio.to_thread(drawn, net, side, [body for body, _ in batch])
            for (_, future), picture in zip(batch, pictures, strict=True):
                future.set_result(picture)

    @app.post(URL)
    async def generations(body: dict) -> Response:
        if not working:
            working.append(asyncio.create_task(work()))
        future = asyncio.get_running_loop().create_future()
        await queue.put((body, future))
        return Response(await future, media_type="image/png")

    working: list[asyncio.Task] = []
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="critical")


@torch.inference_mode()
def drawn(net: torch.nn.Module, side: int, bodies: list[dict]) -> list[bytes]:
    """PNGs, each with the loop of diffusers' pipelines, its own scheduler among them; one call of the network for all."""
    from io import BytesIO

    from diffusers import DDIMScheduler
    from PIL import Image

    schedulers = [DDIMScheduler(num_train_timesteps=1_000) for _ in bodies]
    x = []
    for scheduler, body in zip(schedulers, bodies, strict=True):
        scheduler.set_timesteps(body["steps"])
        x.append(torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(body["seed"])))
    for step in range(max(body["steps"] for body in bodies)):
        # who is done earlier is asked on, since the batch has a shape
        times = [scheduler.timesteps[min(step, len(scheduler.timesteps) - 1)] for scheduler in schedulers]
        rows, when, labels = [], [], []
        for each, at, body in zip(x, times, bodies, strict=True):
            for label in [8, 0] if body["guidance"] != 1 else [0]:  # the eighth is none
                rows.append(each)
                when.append(at)
                labels.append(label)
        with torch.autocast("cpu", torch.bfloat16):
            asked = torch.cat(rows).contiguous(memory_format=torch.channels_last)
            answers = net(asked, torch.stack(when), class_labels=torch.tensor(labels)).sample.float()
        answers = list(answers.split(1))
        for number, (scheduler, body, at) in enumerate(zip(schedulers, bodies, times, strict=True)):
            noise = answers.pop(0)
            if body["guidance"] != 1:
                noise = noise + body["guidance"] * (answers.pop(0) - noise)
            if step < body["steps"]:
                x[number] = scheduler.step(noise, at, x[number]).prev_sample
    files = []
    for each in x:
        pixels = ((each[0] / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0)
        file = BytesIO()
        Image.fromarray(pixels.numpy()).save(file, "PNG")
        files.append(file.getvalue())
    return files


class Outcome(NamedTuple):
    """Requests a second, and the seconds of each."""

    rate: float
    seconds: list[float]

    def quantile(self, share: float) -> float:
        return float(np.quantile(self.seconds, share))


def bodies_for(count: int, seed: int) -> list[dict]:
    random, shared = np.random.default_rng(seed), {"label": "a", "sampler": "ddim"}
    return [
        shared | {"seed": number, "steps": int(random.choice(STEPS)), "guidance": float(random.choice([1, 2]))}
        for number in range(count)
    ]


async def asked(port: int, bodies: list[dict], arrivals: np.ndarray) -> Outcome:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=None, limits=limits) as client:
        began = time.monotonic()

        async def one(body: dict, due: float) -> float:
            await asyncio.sleep(max(0.0, began + due - time.monotonic()))
            answer = await client.post(URL, json=body, headers={"Accept": "image/png"})
            assert answer.status_code == 200, answer.text
            return time.monotonic() - began - due

        seconds = await asyncio.gather(*(one(body, due) for body, due in zip(bodies, arrivals, strict=True)))
        return Outcome(len(bodies) / (time.monotonic() - began), list(seconds))


@contextmanager
def serving(target, *arguments: object) -> Iterator[int]:
    """A contender in a process of its own, once it has drawn something.  Gives its port."""
    port = free_port()
    process = multiprocessing.get_context("spawn").Process(target=target, args=(port, *arguments), daemon=True)
    process.start()
    try:
        for _ in range(1_200):
            try:
                asyncio.run(asked(port, bodies_for(2, 1), np.zeros(2)))
                break
            except httpx.TransportError:
                time.sleep(0.1)
        yield port
    finally:
        process.terminate()
        process.join(30)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--slots", type=int, default=16, help="of the static contender: pictures of a batch")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of torch; Ray gives a replica of one CPU one")
    arguments = parser.parse_args()
    bundle = bundle_of(arguments.preset)
    net = peer_net(forward_flops(bundle.denoiser, bundle.spec.resolution), bundle.spec.resolution, 8, LEVELS)
    print(
        f"their widths {tuple(net.config.block_out_channels)}, {arguments.requests} requests of {STEPS} steps",
        flush=True,
    )
    bodies = bodies_for(arguments.requests, 0)
    with ExitStack() as running:
        ports = {"ours": running.enter_context(serving(ours, arguments))}
        for name, slots in (("locked", 1), ("static", arguments.slots)):
            ports[name] = running.enter_context(serving(theirs, arguments, dict(net.config), slots))
        rates: dict[str, list[float]] = {}
        for turn in range(arguments.turns):
            for name in sorted(ports, reverse=bool(turn % 2)):
                outcome = asyncio.run(asked(ports[name], bodies, np.zeros(len(bodies))))
                rates.setdefault(name, []).append(outcome.rate)
        print("| at saturation | requests/s | ours over it |\n|---|---|---|")
        for name in ports:
            ratio = statistics.median(o / r for o, r in zip(rates["ours"], rates[name], strict=True))
            print(f"| {name} | {statistics.median(rates[name]):.2f} | {ratio:.2f} |", flush=True)
        print("\n| load | contender | p50 s | p95 s | p99 s |\n|---|---|---|---|---|")
        most = statistics.median(rates["ours"])
        for load in LOADS:
            for name in ports:
                if statistics.median(rates[name]) < load * most:
                    print(f"| {load:.0%} | {name} | cannot keep up | | |")
                    continue
                found = [
                    asyncio.run(asked(ports[name], bodies, arrivals_of(len(bodies), load * most, turn)))
                    for turn in range(arguments.turns)
                ]
                told = (statistics.median(one.quantile(q) for one in found) for q in (0.5, 0.95, 0.99))
                print(f"| {load:.0%} | {name} | {' | '.join(f'{each:.3f}' for each in told)} |", flush=True)


if __name__ == "__main__":
    main()
