"""`diffusion bench-serve`: load on an endpoint, and how long its answers take."""

import os
import time
from collections.abc import Sequence
from typing import Annotated

import typer

from flows.console import progress, say, warn
from flows.foreground import looking
from flows.options import Debug, Home
from flows.site import Site

app = typer.Typer()


@app.command("bench-serve")
def bench_serve(
    url: Annotated[str | None, typer.Option("--url", help="The endpoint. [that of this site]")] = None,
    rate: Annotated[
        float | None,
        typer.Option("--rate", min=0.001, metavar="PER_SECOND", help="Arrive at random, so many a second."),
    ] = None,
    clients: Annotated[
        int | None, typer.Option("--clients", min=1, max=512, help="Instead: each asks when it has its answer. [16]")
    ] = None,
    requests: Annotated[int, typer.Option("--requests", min=1, max=1_000_000, help="In all.")] = 200,
    task: Annotated[
        list[str] | None,
        typer.Option("--task", help="generation, super-resolution, inpainting, colorization, edit. Repeatable. [all]"),
    ] = None,
    steps: Annotated[list[int] | None, typer.Option("--steps", help="Repeatable. [the model's]")] = None,
    guidance: Annotated[list[float] | None, typer.Option("--guidance", help="Repeatable. [the model's]")] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of what is asked, and when.")] = 0,
    key: Annotated[str | None, typer.Option("--key", help="Where the endpoint wants one. [DIFFUSION_KEY]")] = None,
    home: Home = None,
    debug: Debug = False,
) -> None:
    """Ask an endpoint for many pictures, of all its tasks, and say how long they took: from when each was due."""

    def work(site: Site) -> None:
        from diffusion.serving import load

        if rate is not None and clients is not None:
            raise ValueError(f"--rate {rate:g} and --clients {clients}: give one of the two")
        place = url or f"http://{site.host}:{site.port}"
        secret = key or os.environ.get("DIFFUSION_KEY")
        model = load.model_of(place, secret)
        mix = load.Mix(tasks=tuple(task or load.tasks_of(model)), steps=steps or (None,), guidance=guidance or (None,))
        asked = load.asks(model, mix, requests, seed)
        way = f"{rate:g} a second, at random" if rate else f"{clients or 16} clients, each when it has its answer"
        say(f"  endpoint   {place}, {model['id']} version {model['version']}")
        say(f"  load       {requests:,} requests, {way}")
        began = time.monotonic()
        with progress("bench-serve", "answers") as update:
            if rate is None:
                answers = load.closed_loop(place, asked, clients or 16, key=secret, progress=update)
            else:
                answers = load.open_loop(place, asked, rate, key=secret, seed=seed, progress=update)
        _told(answers, time.monotonic() - began)

    looking(work, debug, home=home)


def _told(answers: Sequence, seconds: float) -> None:
    from diffusion.serving.load import figures, refusals

    found = figures(answers)
    say(f"  took       {seconds:.1f} s: {found['all'].answered / seconds if found else 0:.2f} answers a second")
    say(f"  {'task':<18} {'answered':>8} {'p50 s':>8} {'p95 s':>8} {'p99 s':>8}")
    for task, each in found.items():
        say(f"  {task:<18} {each.answered:>8,} {each.p50:>8.3f} {each.p95:>8.3f} {each.p99:>8.3f}")
    for status, count in refusals(answers).items():
        what = f"with status {status}" if status else "with no answer"
        why = next((f": {answer.said}" for answer in answers if answer.status == status and answer.said), "")
        warn(f"{count:,} of {len(answers):,} ended {what}{why}")
