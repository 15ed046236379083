"""What an engine and its endpoint keep under load: `python -m tests.benchmarks.bench_under_load PART`.

exact        --requests of every kind (all tasks, samplers, guidance on and off), each drawn alone and then under a random
             load with bursts, priorities, previews and requests that are given up: differing bytes
price        what it costs that rows have the same bits in every batch: the calls that the ladder plans for the rows of each
             tick of a load, against one call of exactly so many rows, each the quickest of several
simulate     what the measured costs of calls alone lead to expect of an overload: the engine's own rules, with a clock
overload     over HTTP: seconds at 80 % of the saturated rate, and at ten times it: of those accepted, and of refusals
disconnects  over HTTP: --requests clients that leave at a random moment, beside others whose pictures are compared
soak         over HTTP: --minutes of load at 60 % with leavers: RssAnon at each minute, and what is left at the end

The network is --preset's with random weights, or a tiny one.  Other programs make the figures worse: say what ran beside.
"""

import argparse
import json
import multiprocessing
import os
import re
import socket
import threading
import time
import urllib.parse
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import httpx
import numpy as np
import torch

from diffusion.recipe import ServeRecipe
from diffusion.serving import load
from diffusion.serving.admission import Admission
from diffusion.serving.door import Door
from diffusion.serving.engine import Engine
from diffusion.serving.forecast import Part
from diffusion.serving.job import Job
from diffusion.serving.ticket import QueueFull, Ticket, TooBusy
from diffusion.serving.trial import trial_query
from tests.benchmarks.bench_serving import arrivals_of, bundle_of
from tests.benchmarks.bench_serving import jobs_for as serving_jobs
from tests.benchmarks.bench_serving import simulated as by_clock
from tests.integration.test_http import served
from tests.random_bundle import random_bundle
from tests.random_load import Storm, alone, random_jobs, storm_of, watching

LIMITS = ServeRecipe(max_steps=1_000)
MIX = {"steps": (10, 20, 50), "guidance": (1.0, 2.0)}
REPEATS = 15  # of timing a call


def engine_of(preset: str) -> Engine:
    engine = Engine.serving(random_bundle() if preset == "tiny" else bundle_of(preset), LIMITS)
    print(f"{preset}: {engine.slots} slots; a call takes {engine.ladder.told()}")
    return engine


def exact(arguments: argparse.Namespace) -> None:
    engine = engine_of(arguments.preset)
    jobs = random_jobs(engine, arguments.requests, arguments.seed)
    began = time.monotonic()
    expected = [alone(engine, job) for job in jobs]
    print(f"alone: {sum(map(len, expected))} pictures of {len(jobs)} requests in {time.monotonic() - began:.0f} s")
    engine.start()
    began = time.monotonic()
    storm = storm_of(engine, jobs, arguments.seed + 1)
    took = time.monotonic() - began
    engine.stop()
    differing = sum(storm.drawn[number] != digests for number, digests in enumerate(expected))
    sizes = np.bincount(storm.ticks)
    print(
        f"under load: {took:.0f} s, {len(storm.ticks)} ticks of {storm.ticks and min(storm.ticks)} to {len(sizes) - 1} rows,"
    )
    print(f"  {storm.left} given up on the way, {storm.late} asked for once more after that")
    print(f"requests with a differing byte: {differing}")


def price(arguments: argparse.Namespace) -> None:
    engine = engine_of(arguments.preset)
    jobs = random_jobs(engine, arguments.requests, arguments.seed, steps=20)
    for name, pause in (("at saturation", 0.0), ("with pauses", 100.0)):
        engine.start()
        mean_s = engine.networks.seconds(engine.slots) * pause
        storm = storm_of(
            engine, jobs, 1, leavers=0, pause_s=lambda random, mean_s=mean_s: float(random.exponential(mean_s))
        )
        engine.stop()
        counts = np.bincount(storm.ticks)
        planned, free = seconds_of(engine, [rows for rows in range(1, len(counts)) if counts[rows]])
        ladders, frees = (sum(counts[rows] * each[rows] for rows in each) for each in (planned, free))
        print(f"{name}: ticks by rows { {rows: int(counts[rows]) for rows in planned} }")
        print(f"  the ladder's calls take {ladders:.1f} s, free batches {frees:.1f} s: {ladders / frees - 1:+.1%}")


@torch.no_grad()
def seconds_of(engine: Engine, rows: Sequence[int]) -> tuple[dict[int, float], dict[int, float]]:
    """Of each number of rows, in turns: by the ladder's plan, and in one call."""
    bundle, ladder = engine.bundle, engine.ladder
    query = trial_query(bundle.spec, max(rows), 0, engine.device)
    found: tuple[dict[int, float], dict[int, float]] = {}, {}
    for _ in range(REPEATS):
        for count in rows:
            part = query._replace(
                x=query.x[:count], sigma=query.sigma[:count], cond={k: v[:count] for k, v in query.cond.items()}
            )
            ways: tuple[Callable[[], object], ...] = (
                lambda part=part: ladder.answer(bundle.denoiser, part),
                lambda part=part: bundle.denoiser(part.x, part.sigma, **part.cond),
            )
            for way, seconds in zip(ways, found, strict=True):
                began = time.perf_counter()
                way()
                seconds[count] = min(time.perf_counter() - began, seconds.get(count, float("inf")))
    return found


def in_child(function: Callable, *given: object, **named: object) -> object:
    """Clients of their own process, so that they do not hold up the endpoint's."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, given, named)


def quantiles(seconds: Sequence[float]) -> str:
    p50, p95, p99 = (float(np.quantile(seconds, share)) for share in (0.5, 0.95, 0.99))
    return f"p50 {p50:.3f} s, p95 {p95:.3f} s, p99 {p99:.3f} s"


def asked_of(url: str, count: int, seed: int = 0) -> list[load.Ask]:
    model = load.model_of(url)
    return load.asks(model, load.Mix(tasks=load.tasks_of(model), **MIX), count, seed)


def saturated(engine: Engine, url: str) -> float:
    """Requests a second."""
    asked, clients = asked_of(url, 8 * engine.slots, seed=9), 2 * engine.slots
    began = time.monotonic()
    in_child(load.closed_loop, url, asked, clients)
    rate = len(asked) / (time.monotonic() - began)
    print(f"saturated: {rate:.2f} requests a second")
    return rate


def overload(arguments: argparse.Namespace) -> None:
    engine = engine_of(arguments.preset)
    submit, refusing = engine.submit, list[float]()

    def timed(*given: object, **named: object) -> object:
        began = time.perf_counter()
        try:
            return submit(*given, **named)
        except (QueueFull, TooBusy):
            refusing.append(time.perf_counter() - began)
            raise

    engine.submit = timed
    with served(engine, LIMITS) as client:
        url = str(client.base_url).rstrip("/")
        rate = saturated(engine, url)
        found = {}
        for share, count in ((0.8, arguments.requests), (10.0, int(10 * rate * arguments.minutes * 60))):
            refusing.clear()
            answers = in_child(load.open_loop, url, asked_of(url, count, seed=1), share * rate, seed=2)
            due = np.cumsum(np.random.default_rng([2, 1]).exponential(1 / (share * rate), count))
            taken = [a.seconds for a in answers if a.status == 200]
            found[share] = float(np.quantile(taken, 0.99))
            print(f"{share:g} x: {count} requests in {due[-1]:.0f} s; {len(taken)} accepted: {quantiles(taken)}")
            if refused := [a for a in answers if a.status != 200]:
                print(f"  {load.refusals(answers)} refused, {sum(a.retry_after for a in refused)} with Retry-After,")
                print(
                    f"  answered in {quantiles([a.seconds for a in refused])}; of that the engine {quantiles(refusing)}"
                )
            if share > 1:
                later = [a.seconds for a, at in zip(answers, due, strict=True) if a.status == 200 and at > 30]
                print(f"  accepted after the first 30 s: {len(later)}: {quantiles(later)}")
                print(f"  their p99 over that at 0.8 x: {np.quantile(later, 0.99) / found[0.8]:.2f}")
        print(f"left at the end: {engine.load()}")


def reckoned(engine: Engine, jobs: Sequence[Job], arrivals: np.ndarray) -> dict[int, float]:
    """By number the seconds of those accepted, by the engine's own door and turns with a clock: a tick takes what was found
    of its calls, all else nothing."""
    door = Door(engine.slots, engine.rows, LIMITS.queue, LIMITS.max_wait_s, cache(engine.networks.seconds))
    numbers: dict[Ticket, int] = {}
    turns, flying, seconds, clock, number = Admission(), list[Flown](), dict[int, float](), 0.0, 0
    while number < len(jobs) or turns or flying:
        while number < len(jobs) and arrivals[number] <= clock:
            ticket = Ticket(jobs[number], LIMITS.timeout_s, submitted_at=float(arrivals[number]))
            with suppress(TooBusy, QueueFull):
                door.check(ticket, turns, flying)
                if not turns:
                    door.patience.empty(ticket.submitted_at)
                turns.add(ticket)
                numbers[ticket] = number
            number += 1
        while turn := turns.take(engine.slots - len(flying), engine.rows - sum(one.left.rows for one in flying)):
            turn[0].started_at = clock
            flying.append(Flown(*turn, turn[0].job.evaluations))
        if not flying:
            clock = float(arrivals[number]) if number < len(jobs) else clock
            continue
        clock += door.seconds(sum(one.left.rows for one in flying))
        for one in flying:
            one.to_go -= 1
            if not one.to_go:
                seconds[numbers[one.ticket]] = clock - one.ticket.submitted_at
                door.patience.drew(clock - one.ticket.started_at)
        flying = [one for one in flying if one.to_go]
    return seconds


@dataclass(eq=False)
class Flown:
    """What the door sees of a flight."""

    ticket: Ticket
    images: range
    to_go: int

    @property
    def left(self) -> Part:
        return Part(1, self.ticket.job.rows, self.to_go)


def simulate(arguments: argparse.Namespace) -> None:
    engine = engine_of(arguments.preset)
    many = serving_jobs(engine, 300, 0)
    rate = by_clock(engine, "ours", many, np.zeros(len(many)), engine.slots).rate
    print(f"saturated: {rate:.2f} requests a second")
    found = {}
    for share, seconds in ((0.8, arguments.minutes * 600), (10.0, arguments.minutes * 60)):
        count = int(share * rate * seconds)
        jobs = [many[i] for i in np.random.default_rng(1).integers(len(many), size=count)]
        arrivals = arrivals_of(len(jobs), share * rate, 1)
        taken = reckoned(engine, jobs, arrivals)
        found[share] = [each for number, each in taken.items() if share < 1 or arrivals[number] > 30]
        print(f"{share:g} x: {len(taken)} of {len(jobs)} accepted: {quantiles(list(taken.values()))}")
    print(f"accepted after the first 30 s: {len(found[10.0])}: {quantiles(found[10.0])}")
    print(f"their p99 over that at 0.8 x: {np.quantile(found[10.0], 0.99) / np.quantile(found[0.8], 0.99):.2f}")


def leave(url: str, ask: load.Ask, after_s: float) -> None:
    """Send a request, and close the connection."""
    place = urllib.parse.urlsplit(url)
    with socket.create_connection((place.hostname, place.port)) as connection:
        head = f"POST {ask.path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {ask.kind}\r\nContent-Length: {len(ask.body)}"
        connection.sendall(f"{head}\r\n\r\n".encode() + ask.body)
        time.sleep(after_s)


def pictures_of(client: httpx.Client, ask: load.Ask) -> list[str]:
    """PNGs with their receipts, as base64."""
    while True:
        answer = client.post(ask.path, content=ask.body, headers={"Content-Type": ask.kind}, timeout=600)
        if answer.status_code != 503:
            answer.raise_for_status()
            return [one["b64_json"] for one in answer.json()["data"]]
        time.sleep(0.2)


def disconnects(arguments: argparse.Namespace) -> None:
    engine, storm = engine_of(arguments.preset), Storm()
    random = np.random.default_rng(arguments.seed)
    with served(engine, LIMITS) as client, ThreadPoolExecutor(12) as pool:
        url = str(client.base_url).rstrip("/")
        asked = asked_of(url, 12)
        expected = [pictures_of(client, ask) for ask in asked]
        mean_s = 20 * engine.networks.seconds(engine.slots)
        differing, stop = 0, threading.Event()

        def neighbour(first: int) -> int:
            wrong, number = 0, first
            while not stop.is_set():
                wrong += pictures_of(client, asked[number % len(asked)]) != expected[number % len(asked)]
                number += 1
            return wrong * 1_000_000 + number - first

        with watching(engine, storm):
            beside = [pool.submit(neighbour, 13 * first) for first in range(3)]
            gone = [
                pool.submit(leave, url, asked[int(random.integers(len(asked)))], float(random.exponential(mean_s)))
                for _ in range(arguments.requests)
            ]
            for one in gone:
                one.result()
            stop.set()
            differing, compared = map(sum, zip(*(divmod(one.result(), 1_000_000) for one in beside), strict=True))
        began = time.monotonic()
        while any(engine.load()[name] for name in ("drawing", "waiting")) and time.monotonic() - began < 30:
            time.sleep(0.001)
        print(f"idle {time.monotonic() - began:.3f} s after the last left: {engine.load()}")
        cancelled = re.search(r"^diffusion_cancelled_total\S* (\S+)", client.get("/metrics").text, re.MULTILINE)
        print(f"{arguments.requests} left, {float(cancelled[1]):.0f} of them before their pictures were done")
        print(f"asked for in a tick that began after: {storm.late} of {len(storm.ticks)} ticks")
        print(f"neighbours: {compared} answers compared, {differing} differ")
        again = [pictures_of(client, ask) != before for ask, before in zip(asked, expected, strict=True)]
        print(f"after it: {sum(again)} of {len(asked)} differ")


def rss_anon_mib() -> float:
    return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def soak(arguments: argparse.Namespace) -> None:
    engine = engine_of(arguments.preset)
    random = np.random.default_rng(arguments.seed)
    with served(engine, LIMITS) as client, ThreadPoolExecutor(4) as pool:
        url = str(client.base_url).rstrip("/")
        rate = arguments.rate or 0.6 * saturated(engine, url)
        first = pictures_of(client, asked_of(url, 1)[0])
        for minute in range(int(arguments.minutes)):
            asked = asked_of(url, max(1, int(rate * 60)), seed=minute)
            leaving = [pool.submit(leave, url, ask, float(random.exponential(0.3))) for ask in asked[::5]]
            answers = in_child(load.open_loop, url, asked, rate, seed=minute)
            for one in leaving:
                one.result()
            taken = [a.seconds for a in answers if a.status == 200]
            about = {"minute": minute + 1, "rss_anon_mib": round(rss_anon_mib(), 1), "answered": len(taken)}
            about |= {"refused": load.refusals(answers), "p99": round(float(np.quantile(taken, 0.99)), 2)}
            print(json.dumps(about | {"threads": threading.active_count(), "fds": len(os.listdir("/proc/self/fd"))}))
        time.sleep(5)
        print(f"left at the end: {engine.load()}, alive: {engine.alive()}")
        print(
            f"the first picture again: {'the same' if pictures_of(client, asked_of(url, 1)[0]) == first else 'ANOTHER'}"
        )


PARTS = {each.__name__: each for each in (exact, price, simulate, overload, disconnects, soak)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--preset", default="tiny", help="tiny, or a preset such as demo")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--rate", type=float, help="of soak, requests a second; default: 60 %% of the saturated")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    PARTS[arguments.part](arguments)


if __name__ == "__main__":
    main()
