"""What a person sees: a line per stage, a bar with rate and time left, a summary.  Libraries' own output goes to a file.

Where the output is no terminal (a CI log, a Prefect worker), a bar becomes a plain line about every ten seconds.  A program
in the foreground that has said nothing for longer says at least that it lives.
"""

import io
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

PLAIN_EVERY_S = 10.0
_SILENT_S = 13.0  # longer than from one plain line to the next, which comes with the first update after `PLAIN_EVERY_S`
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")  # all but tabs and line ends

_out: Console | None = None
_err: Console | None = None
_silence: "_Silence | None" = None


class Update(Protocol):
    """Tells how far a stage is: `done` of `total`, and numbers and words worth showing beside it."""

    def __call__(self, done: int, total: int, note: str = "", **facts: float) -> None: ...


def out() -> Console:
    """Where people read."""
    return _out or Console(highlight=False, soft_wrap=True)


def say(text: str = "", *, title: str = "") -> None:
    """One line for people, the `title` before it in bold.  Brackets are brackets: paths and class names have them."""
    _print(Text.assemble((title, "bold"), _shown(text)))


def ticked(text: str) -> None:
    """A line about what is finished."""
    _print(Text.assemble(("✓ ", "green"), _shown(text)))


def warn(text: str) -> None:
    """A line about what people should know and need not stop for."""
    _print(Text.assemble(("! ", "yellow"), _shown(text)))


def error(text: str) -> None:
    """What went wrong and what to type next, on standard error."""
    _errors().print(Text.assemble(("error: ", "bold red"), _shown(text)))


def _errors() -> Console:
    return _err or Console(stderr=True, highlight=False, soft_wrap=True)


def _print(text: Text) -> None:
    if _silence:
        _silence.broken(time.monotonic())
    out().print(text)


def _shown(text: str) -> str:
    """Text with its control characters written out: names and captions come with somebody's data, and a terminal obeys."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class _Warned(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        warn(record.getMessage())


@contextmanager
def warned() -> Iterator[None]:
    """Within the block what `store.retry` says of a wait is a line for people."""
    log, handler = logging.getLogger("diffusion.storage"), _Warned(logging.WARNING)
    before, log.handlers, log.propagate = (log.handlers, log.propagate), [handler], False
    try:
        yield
    finally:
        log.handlers, log.propagate = before


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
def alive(every_s: float = _SILENT_S) -> Iterator[None]:
    """Within the block a line says that the program lives, where nothing else has said anything for `every_s`; another after
    twice as long, and so on.  On standard error, so that it is no part of what a command gives.
    """
    global _silence
    silence = _silence = _Silence(time.monotonic(), every_s)
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(every_s / 10):
            if length := silence.due(time.monotonic()):
                _errors().print(f"  still at work, nothing new for {seconds(length)}")

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    try:
        yield
    finally:
        ended.set()
        watching.join()
        _silence = None


@contextmanager
def moving() -> Iterator[None]:
    """Within the block people see that the program lives, or know that it waits for them."""
    silence = _silence
    if silence:
        silence.moving += 1
    try:
        yield
    finally:
        if silence:
            silence.moving -= 1
            silence.broken(time.monotonic())


class _Silence:
    """How long nothing was said, and when that is worth a line.  Times in seconds."""

    def __init__(self, now: float, every_s: float) -> None:
        self.every_s, self.moving = every_s, 0
        self.broken(now)

    def broken(self, now: float) -> None:
        self.since, self.next = now, self.every_s

    def due(self, now: float) -> float | None:
        """The length of the silence, where a line is due."""
        length = now - self.since
        if self.moving or length < self.next:
            return None
        self.next = 2 * length
        return length


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
        TextColumn("{task.fields[pace]}"),
        TextColumn("{task.fields[facts]}"),
    )
    pace = _Pace(unit)
    with moving(), Progress(*columns, console=console, transient=True) as bars:
        bar = bars.add_task(stage, total=None, pace="", facts="")

        def update(done: int, total: int, note: str = "", **facts: float) -> None:
            words = pace(done, total, time.monotonic())
            bars.update(bar, total=total, completed=done, pace=words, facts=_facts(note, facts))

        yield update


@contextmanager
def waiting(text: str) -> Iterator[None]:
    """A spinner for what has no measure, or the line alone where there is no terminal."""
    console = out()
    if console.is_terminal:
        with moving(), console.status(f"  {text}"):
            yield
    else:
        _print(Text(f"  {text}"))
        yield


def seconds(duration: float) -> str:
    """A duration for people: "8.1 s", "5:07"."""
    return f"{duration:.1f} s" if duration < 60 else f"{int(duration) // 60}:{int(duration) % 60:02d}"


class _Pace:
    """The rate since the first report, and the time left at that rate.  A resumed run first reports in its middle."""

    def __init__(self, unit: str) -> None:
        self.unit = unit
        self.first: tuple[float, int] | None = None

    def __call__(self, done: int, total: int, now: float) -> str:
        """In words; empty while there is too little to go by: the first reports may come all at once."""
        self.first = self.first or (now, done)
        taken, made = now - self.first[0], done - self.first[1]
        if taken <= 1 or made <= 0:
            return ""
        rate = made / taken
        return f"{rate:,.{0 if rate >= 10 else 1}f} {self.unit}/s, {seconds((total - done) / rate)} left"


def _plain(stage: str, unit: str, *, now: Callable[[], float] = time.monotonic) -> Update:
    pace, said, last = _Pace(unit), now(), ""

    def update(done: int, total: int, note: str = "", **facts: float) -> None:
        nonlocal said, last
        time_now = now()
        speed = pace(done, total, time_now)
        if done < total and (time_now - said < PLAIN_EVERY_S or not speed):
            return
        share = f"{done:,} of {total:,} {unit} ({100 * done // total if total else 100} %)"
        if done >= total and last == (last := f"{share}{_facts(note, facts)}"):
            return  # the end was told
        said = time_now
        say(f"  {stage:<9} {', '.join(filter(None, (share, speed)))}  {_facts(note, facts)}".rstrip())

    return update


def _facts(note: str, facts: dict[str, float]) -> str:
    return "  ".join(filter(None, (note, *(f"{name} {value:.4g}" for name, value in facts.items()))))
