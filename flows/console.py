"""What a person sees: a line per stage, a bar with rate and time left, a summary.  Libraries' own output goes to a file.

Where the output is no terminal (a CI log, a Prefect worker), a bar becomes a plain line about every ten seconds.
"""

import io
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

PLAIN_EVERY_S = 10.0

_out: Console | None = None
_err: Console | None = None


class Update(Protocol):
    """Tells how far a stage is: `done` of `total`, and numbers worth showing beside it."""

    def __call__(self, done: int, total: int, **facts: float) -> None: ...


def out() -> Console:
    """Where people read."""
    return _out or Console(highlight=False, soft_wrap=True)


def say(text: str = "") -> None:
    """One line for people.  `text` may hold rich's markup; use `rich.markup.escape` on what others wrote."""
    out().print(text)


def error(text: str) -> None:
    """What went wrong and what to type next, on standard error."""
    console = _err or Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(f"[bold red]error:[/] {escape(text)}")


@contextmanager
def quiet(log: Path) -> Iterator[None]:
    """Within the block all that this process and its children write to standard output or error goes to `log`, except
    what is said through this module.  Done to the descriptors, so that C++ and child processes are covered.
    """
    global _out, _err
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab", buffering=0) as file, _elsewhere(1, file) as out, _elsewhere(2, file) as err:
        _out = Console(file=out, highlight=False, soft_wrap=True)
        _err = Console(file=err, highlight=False, soft_wrap=True)
        try:
            yield
        finally:
            _out = _err = None


@contextmanager
def _elsewhere(descriptor: int, file: io.FileIO) -> Iterator[io.TextIOWrapper]:
    """Within the block `descriptor` is `file`; gives what it was before."""
    stream = sys.stdout if descriptor == 1 else sys.stderr
    stream.flush()
    before = os.dup(descriptor)
    os.dup2(file.fileno(), descriptor)
    try:
        with io.TextIOWrapper(os.fdopen(os.dup(before), "wb", 0), write_through=True) as people:
            yield people
    finally:
        stream.flush()
        os.dup2(before, descriptor)
        os.close(before)


@contextmanager
def progress(stage: str, unit: str) -> Iterator[Update]:
    """A bar for one stage.  The function it gives may be called from any thread, as often as one likes."""
    console = out()
    if not console.is_terminal:
        yield _plain(stage, unit)
        return
    columns = (
        TextColumn("  {task.description:<9}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        _Rate(unit),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[facts]}"),
    )
    with Progress(*columns, console=console, transient=True) as bars:
        bar = bars.add_task(stage, total=None, facts="")

        def update(done: int, total: int, **facts: float) -> None:
            if bars.tasks[0].total is None:  # the rate counts from here: a resumed run starts in the middle
                bars.reset(bar, total=total, completed=done)
            bars.update(bar, total=total, completed=done, facts=_facts(facts))

        yield update


@contextmanager
def waiting(text: str) -> Iterator[None]:
    """A spinner for what has no measure, or the line alone where there is no terminal."""
    console = out()
    if console.is_terminal:
        with console.status(f"  {text}"):
            yield
    else:
        console.print(f"  {text}")
        yield


def seconds(duration: float) -> str:
    """A duration for people: "8.1 s", "5:07"."""
    return f"{duration:.1f} s" if duration < 60 else f"{int(duration) // 60}:{int(duration) % 60:02d}"


class _Rate(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{_rate(speed) if speed else '-'} {self.unit}/s")


def _plain(stage: str, unit: str, *, now: Callable[[], float] = time.monotonic) -> Update:
    first: tuple[float, int] | None = None
    said = now()

    def update(done: int, total: int, **facts: float) -> None:
        nonlocal first, said
        time_now = now()
        if first is None:
            first = (time_now, done)
        if (time_now - said < PLAIN_EVERY_S and done < total) or done == first[1]:
            return
        said = time_now
        taken = time_now - first[0]
        rate = (done - first[1]) / taken if taken > 1 else 0.0  # two early records may come at once
        speed = f", {_rate(rate)}/s, {seconds((total - done) / rate)} left" if rate else ""
        share = f"{done:,} of {total:,} {unit} ({100 * done // total} %)"
        say(f"  {stage:<9} {share}{speed}  {_facts(facts)}".rstrip())

    return update


def _rate(per_second: float) -> str:
    return f"{per_second:,.0f}" if per_second >= 10 else f"{per_second:.1f}"


def _facts(facts: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in facts.items())
