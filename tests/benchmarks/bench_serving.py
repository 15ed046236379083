"""Requests of mixed lengths served in four ways, on the same network: `python -m tests.benchmarks.bench_serving`.

Requests are single pictures of 10, 20 or 50 steps, guided or not, of five tasks (two of generation, super-resolution,
inpainting, colorization, an edit), the same for every contender:

ours      the engine: each tick one call over the open questions of all pictures
alone     one request after the other, as a server with a lock around a pipeline
static    up to --slots requests that came within 10 ms run together until the longest of them is done, as in `@serve.batch`
grouped   the same, but only requests of equal evaluations together, so that no row is asked in vain

Saturation: --requests of them wait already.  Load: they arrive at random (a Poisson process) at shares of ours' saturated
rate, and the time from arrival to picture counts.  The contenders take turns; what counts are ratios within a turn.
`--simulate` adds what the calls' measured costs alone lead to expect: the same policies, with a clock instead of a network.

The network is the demo's, with random weights.  Run it on a machine that does nothing else.
"""

import argparse
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from diffusion.data.images import encode_png
from diffusion.denoiser import denoiser_of
from diffusion.presets import PRESETS
from diffusion.sampler import Conversation, Query
from diffusion.serving.admission import Admission
from diffusion.serving.editing import EditRequest, edit
from diffusion.serving.engine import Engine
from diffusion.serving.flight import gather
from diffusion.serving.given import Given
from diffusion.serving.job import Job, unwatched
from diffusion.serving.request import GenerateRequest, resolve
from diffusion.serving.restoring import RestoreRequest, restoration
from diffusion.serving.ticket import Ticket
from diffusion.store.bundle import Bundle
from tests.random_bundle import random_spec

STEPS = (10, 20, 50)
WAIT_S = 0.01  # for others, as @serve.batch's default
LOADS = (0.5, 0.8, 0.95)
POLICIES = ("alone", "static", "grouped")


def bundle_of(name: str) -> Bundle:
    """The network of a preset, weights random but small, so that answers stay finite."""
    recipe = PRESETS[name]()
    classes = tuple("abcdefgh")
    resolution = recipe.shard.resolution
    shape = {"resolution": resolution, "classes": len(classes), "image_channels": 0}
    denoiser = denoiser_of(recipe.train.unet, **shape, sigma_data=0.5, precision=recipe.train.precision)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.3
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    count = sum(parameter.numel() for parameter in denoiser.parameters())
    spec = random_spec(recipe.train.precision, "4" * 64, count).model_copy(
        update={"classes": classes, "resolution": resolution, "unet": recipe.train.unet}
    )
    return Bundle(spec, "5" * 64, denoiser.eval().requires_grad_(False))


def jobs_for(engine: Engine, count: int, seed: int) -> list[Job]:
    """Requests drawn at random, the same for the same seed."""
    random = np.random.default_rng(seed)
    bundle, device, side = engine.bundle, engine.device, engine.bundle.spec.resolution
    given = Given.of(encode_png(random.integers(0, 256, (side, side, 3), dtype=np.uint8)), "image")
    hole = np.zeros((side, side, 3), np.uint8)
    hole[:, side // 2 :] = 255
    mask = Given.of(encode_png(hole), "mask")
    jobs = []
    for number in range(count):
        steps, guided, task = int(random.choice(STEPS)), bool(random.integers(2)), int(random.integers(5))
        said = {
            "label": bundle.spec.classes[number % 8],
            "seed": number,
            "steps": steps,
            "guidance": 2.0 if guided else 1.0,
        }
        if task == 0:
            jobs.append(engine.job(resolve(GenerateRequest(**said, sampler="ddim"), bundle.spec)))
        elif task == 1:
            asked = EditRequest(**said, sampler="ddim", strength=1.0)
            jobs.append(edit(asked, given, None, bundle, device).job)
        else:
            kind = ("super-resolution", "inpainting", "colorization")[task - 2]
            how = {"factor": 4} if task == 2 else {}
            asked = RestoreRequest(task=kind, **said, **how, repeats=1)
            jobs.append(restoration(asked, given, mask if task == 3 else None, bundle, device).job)
    return jobs


@dataclass(eq=False)
class Waiting:
    """A request that has arrived."""

    job: Job
    arrived: float
    done: float = 0.0
    conversation: Conversation | None = None
    query: Query | None = None

    @property
    def rows(self) -> int:
        return self.job.rows

    def ask(self) -> None:
        self.conversation = self.job.converse(range(1), unwatched)
        self.query = next(self.conversation)

    def answer(self, answer: torch.Tensor) -> bool:
        """Whether it asks again."""
        try:
            self.query = self.conversation.send(answer)
            return True
        except StopIteration:
            return False


def batch_of(policy: str, queue: Sequence[Waiting], slots: int) -> list[Waiting]:
    """Which of the waiting requests run next, together."""
    if policy == "alone":
        return list(queue)[:1]
    first = queue[0].job.evaluations
    fitting = [one for one in queue if policy == "static" or one.job.evaluations == first]
    return fitting[:slots]


@torch.no_grad()
def run_together(engine: Engine, batch: list[Waiting]) -> None:
    """All until the last is done; who is done earlier is asked on, since the batch has a shape."""
    for one in batch:
        one.ask()
    asking = dict.fromkeys(batch, True)
    while any(asking.values()):
        query = gather([one.query for one in batch])
        answers = engine.denoise(query.x, query.sigma, **query.cond).split([len(one.query.x) for one in batch])
        for one, answer in zip(batch, answers, strict=True):
            asking[one] = asking[one] and one.answer(answer)


@dataclass
class Outcome:
    """Requests a second, and the seconds of each request."""

    rate: float
    seconds: list[float] = field(default_factory=list)

    def quantile(self, share: float) -> float:
        return float(np.quantile(self.seconds, share))


def by_policy(engine: Engine, policy: str, jobs: list[Job], arrivals: np.ndarray, slots: int) -> Outcome:
    began = time.monotonic()
    coming, queue, done = deque(zip(jobs, arrivals, strict=True)), list[Waiting](), list[Waiting]()
    while coming or queue:
        now = time.monotonic() - began
        while coming and coming[0][1] <= now:
            queue.append(Waiting(*coming.popleft()))
        if not queue:
            time.sleep(max(0.0, coming[0][1] - now))
            continue
        if policy != "alone" and len(queue) < slots and coming and now - queue[-1].arrived < WAIT_S:
            time.sleep(0.001)
            continue
        batch = batch_of(policy, queue, slots)
        run_together(engine, batch)
        queue = [one for one in queue if one not in batch]
        for one in batch:
            one.done = time.monotonic() - began
        done += batch
    return Outcome(len(done) / (time.monotonic() - began), [one.done - one.arrived for one in done])


def by_engine(engine: Engine, jobs: list[Job], arrivals: np.ndarray) -> Outcome:
    engine.start()
    try:
        began, seconds, tickets = time.monotonic(), [0.0] * len(jobs), []
        for number, (job, arrival) in enumerate(zip(jobs, arrivals, strict=True)):
            time.sleep(max(0.0, arrival - (time.monotonic() - began)))
            ticket = engine.submit(job)

            def over(_: object, number: int = number, arrival: float = arrival) -> None:
                seconds[number] = time.monotonic() - began - arrival

            ticket.future.add_done_callback(over)
            tickets.append(ticket)
        for ticket in tickets:
            ticket.future.result()
        return Outcome(len(jobs) / (time.monotonic() - began), seconds)
    finally:
        engine.stop()


def simulated(engine: Engine, policy: str, jobs: list[Job], arrivals: np.ndarray, slots: int) -> Outcome:
    """The policy with a clock: a call takes what the ladder measured for its rows, all else nothing."""
    clock, coming, queue, done = 0.0, deque(zip(jobs, arrivals, strict=True)), list[Waiting](), list[Waiting]()
    flying: dict[Waiting, int] = {}
    turns, by_job = Admission(), dict[Job, Waiting]()  # the engine's own rule, and whose job it is

    def cost(rows: int) -> float:
        return engine.ladder.cost(engine.ladder.plan(rows))

    while coming or queue or flying or turns:
        while coming and coming[0][1] <= clock:
            queue.append(Waiting(*coming.popleft()))
        if not queue and not flying and not turns:
            clock = coming[0][1]
            continue
        if policy == "ours":
            for one in queue:
                turns.add(Ticket(one.job, submitted_at=one.arrived))
                by_job[one.job] = one
            queue = []
            while turn := turns.take(engine.slots - len(flying), engine.rows - sum(one.rows for one in flying)):
                one = by_job.pop(turn[0].job)
                flying[one] = one.job.evaluations
            clock += cost(sum(one.rows for one in flying))
            flying = {one: left - 1 for one, left in flying.items()}
            over = [one for one, left in flying.items() if left == 0]
            flying = {one: left for one, left in flying.items() if left}
        else:
            over = batch_of(policy, queue, slots)
            clock += cost(sum(one.rows for one in over)) * max(one.job.evaluations for one in over)
            queue = [one for one in queue if one not in over]
        for one in over:
            one.done = clock
        done += over
    return Outcome(len(done) / clock, [one.done - one.arrived for one in done])


def arrivals_of(count: int, rate: float, seed: int) -> np.ndarray:
    """Seconds at which requests come; all at once for an infinite rate."""
    if rate == float("inf"):
        return np.zeros(count)
    return np.cumsum(np.random.default_rng([seed, 1]).exponential(1 / rate, count))


def table(engine: Engine, contenders: dict[str, Callable[..., Outcome]], arguments: argparse.Namespace) -> None:
    jobs = jobs_for(engine, arguments.requests, 0)
    rates: dict[str, list[float]] = {}
    for turn in range(arguments.turns):
        for name, serve in turned(contenders, turn):
            rates.setdefault(name, []).append(serve(jobs, arrivals_of(len(jobs), float("inf"), turn)).rate)
    ours = statistics.median(rates["ours"])
    print("\n| at saturation | requests/s | ours over it |\n|---|---|---|")
    for name in contenders:
        ratio = statistics.median(o / r for o, r in zip(rates["ours"], rates[name], strict=True))
        print(f"| {name} | {statistics.median(rates[name]):.2f} | {ratio:.2f} |")
    print("\n| load | contender | p50 s | p95 s | p99 s | ours over it: p50, p99 |\n|---|---|---|---|---|---|")
    for load in LOADS:
        found: dict[str, list[Outcome]] = {}
        for turn in range(arguments.turns):
            arrivals = arrivals_of(len(jobs), load * ours, turn)
            for name, serve in turned(contenders, turn):
                if statistics.median(rates[name]) > load * ours:
                    found.setdefault(name, []).append(serve(jobs, arrivals))
        for name, outcomes in found.items():
            p50, p95, p99 = (statistics.median(o.quantile(q) for o in outcomes) for q in (0.5, 0.95, 0.99))
            ratios = (
                statistics.median(a.quantile(q) / b.quantile(q) for a, b in zip(found["ours"], outcomes, strict=True))
                for q in (0.5, 0.99)
            )
            print(
                f"| {load:.0%} | {name} | {p50:.3f} | {p95:.3f} | {p99:.3f} | {', '.join(f'{r:.2f}' for r in ratios)} |"
            )
        for name in contenders.keys() - found.keys():
            print(f"| {load:.0%} | {name} | cannot keep up | | | |")


def turned(contenders: dict[str, Callable[..., Outcome]], turn: int) -> Iterator[tuple[str, Callable[..., Outcome]]]:
    """Ours first in every other turn, last in the others."""
    yield from sorted(contenders.items(), key=lambda one: (one[0] == "ours") == bool(turn % 2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--slots", type=int, default=16, help="of the others: pictures of a batch")
    parser.add_argument("--ours", type=lambda text: text if text == "auto" else int(text), default="auto")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of torch; Ray gives a replica of one CPU one")
    parser.add_argument("--simulate", action="store_true", help="only what measured costs lead to expect")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    engine = Engine(bundle_of(arguments.preset), slots=arguments.ours, queue=10**6)
    print("seconds a call by rows:", {size: float(f"{s:.3g}") for size, s in engine.ladder.seconds.items()})
    slots = arguments.slots
    print(f"ours: {engine.slots} slots, {engine.rows} rows a tick")
    if arguments.simulate:
        policies = ("ours", *POLICIES)
        contenders = {p: lambda jobs, at, p=p: simulated(engine, p, jobs, at, slots) for p in policies}
    else:
        contenders = {"ours": lambda jobs, at: by_engine(engine, jobs, at)}
        contenders |= {p: lambda jobs, at, p=p: by_policy(engine, p, jobs, at, slots) for p in POLICIES}
    print(f"{arguments.requests} requests of {STEPS} steps, batches of {slots}, {arguments.threads} threads")
    table(engine, contenders, arguments)


if __name__ == "__main__":
    main()
