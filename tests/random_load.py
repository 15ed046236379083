"""Requests of every kind drawn at random, an engine under a random load of them, and clients that leave at random."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from diffusion.data.images import encode_png
from diffusion.sampler import SAMPLERS
from diffusion.serving.editing import EditRequest, edit
from diffusion.serving.engine import Engine
from diffusion.serving.given import Given
from diffusion.serving.job import Job
from diffusion.serving.priority import PRIORITIES
from diffusion.serving.receipt import pixels_sha256
from diffusion.serving.request import GenerateRequest, resolve
from diffusion.serving.restoring import RestoreRequest, restoration
from diffusion.serving.ticket import Picture, QueueFull, Ticket, TooBusy

TASKS = ("generation", "super-resolution", "inpainting", "colorization", "edit", "inversion", "masked edit")


def random_jobs(engine: Engine, count: int, seed: int, steps: int = 8) -> list[Job]:
    """A function of the seed: all tasks and samplers, guidance on and off, 1 to 3 pictures, 2 to `steps` steps."""
    random = np.random.default_rng(seed)
    bundle, device, side = engine.bundle, engine.device, engine.bundle.spec.resolution
    given = Given.of(encode_png(random.integers(0, 256, (side, side, 3), dtype=np.uint8)), "image")
    hole = np.zeros((side, side, 3), np.uint8)
    hole[:, side // 2 :] = 255
    mask, jobs = Given.of(encode_png(hole), "mask"), []
    for number in range(count):
        task, label = TASKS[int(random.integers(len(TASKS)))], str(random.choice(bundle.spec.classes))
        said = {
            "label": label,
            "seed": number,
            "n": int(random.integers(1, 4)),
            "steps": int(random.integers(2, steps + 1)),
            "sampler": str(random.choice(list(SAMPLERS))),
            "guidance": float(random.choice([1.0, 0.0, 1.5, 4.0])),
        }
        if task == "generation":
            jobs.append(engine.job(resolve(GenerateRequest(**said), bundle.spec)))
        elif "edit" in task:
            asked = EditRequest(**said, strength=float(random.choice([0.3, 0.6, 1.0])))
            jobs.append(edit(asked, given, mask if "mask" in task else None, bundle, device).job)
        elif task == "inversion":
            said["n"], said["sampler"] = (
                1,
                str(random.choice([name for name, s in SAMPLERS.items() if not s.stochastic])),
            )
            asked = EditRequest(**said, strength=0.8, from_label=bundle.spec.classes[0])
            jobs.append(edit(asked, given, None, bundle, device).job)
        else:
            how = {"factor": int(random.choice([2, 4]))} if task == "super-resolution" else {}
            how |= {"repeats": int(random.integers(1, 3)), "way": "zero-shot"}
            asked = RestoreRequest(task=task, **said, **how)
            jobs.append(restoration(asked, given, mask if task == "inpainting" else None, bundle, device).job)
    return jobs


def digests(pictures: Sequence[Picture]) -> list[str]:
    return [pixels_sha256(picture) for picture in pictures]


def alone(engine: Engine, job: Job) -> list[str]:
    """What an engine that does nothing else draws."""
    return digests(engine.draw([job])[0].future.result())


def insisting(engine: Engine, job: Job, **given: object) -> Ticket:
    """Submitted as often as it takes: a refusal is no answer."""
    while True:
        try:
            return engine.submit(job, **given)
        except (QueueFull, TooBusy):
            time.sleep(0.005)


@dataclass
class Storm:
    """What became of a load.  late: rows of tickets asked in a tick that began after they were given up."""

    drawn: dict[int, list[str]] = field(default_factory=dict)
    left: int = 0
    late: int = 0
    ticks: list[int] = field(default_factory=list)  # rows of each


@contextmanager
def watching(engine: Engine, storm: Storm) -> Iterator[None]:
    """Notes what each tick asks."""
    tick, ask, before, began = engine.tick, engine._ask, engine.on_tick, [0.0]

    def ticked() -> int:
        began[0] = time.monotonic()
        return tick()

    def asked(flights: list) -> list:
        storm.late += sum((flight.ticket.ended_at or began[0]) < began[0] for flight in flights)
        return ask(flights)

    engine.tick, engine._ask, engine.on_tick = ticked, asked, lambda rows, seconds: storm.ticks.append(rows)
    try:
        yield
    finally:
        engine.tick, engine._ask, engine.on_tick = tick, ask, before


def storm_of(
    engine: Engine,
    jobs: Sequence[Job],
    seed: int,
    *,
    leavers: float = 0.2,
    pause_s: Callable[[np.random.Generator], float] = lambda random: float(random.exponential(0.01)),
) -> Storm:
    """Submit the jobs of a running engine in a random order, with random pauses, bursts, priorities and previews.

    leavers: how many more requests, as a share, come with them and are given up at a random moment.
    """
    random, storm, tickets, gone = np.random.default_rng(seed), Storm(), {}, []
    with watching(engine, storm):
        for number in random.permutation(len(jobs)).tolist():
            if random.random() < leavers:
                ticket = insisting(engine, jobs[int(random.integers(len(jobs)))])
                timer = threading.Timer(float(random.exponential(0.05)), ticket.cancel)
                timer.start()
                gone.append((ticket, timer))
            given = {"previews": 2, "show": lambda preview: None} if random.random() < 0.2 else {}
            given["priority"] = PRIORITIES[int(random.integers(3))]
            tickets[number] = insisting(engine, jobs[number], **given)
            if random.random() < 0.5:
                time.sleep(pause_s(random))
        storm.drawn = {number: digests(ticket.future.result(600)) for number, ticket in tickets.items()}
        for ticket, timer in gone:
            timer.join()
            try:
                ticket.future.result(600)
            except CancelledError:
                storm.left += 1
    return storm
