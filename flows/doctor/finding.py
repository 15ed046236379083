"""What a check found, in words: what is wrong, and what to type to mend it."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from diffusion.recipe import Frozen, first_mistake
from flows.site import Site

State = Literal["ok", "warning", "wrong"]


class Finding(Frozen):
    """One line.  mend: what to type, or to do; empty where nothing is to be mended."""

    check: str
    state: State
    what: str
    mend: str = ""


class Asked(NamedTuple):
    """What the checks look at.  lock: file of the versions that this program was tested with."""

    site: Site
    lock: Path


class Check(NamedTuple):
    """run: gives findings, as soon as it has them.  limit_s: seconds that all of it may take.  slow: what to do where it
    takes longer.  machine: whether it can be asked though the site's settings make no sense."""

    name: str
    run: Callable[[Asked], Iterator[Finding]]
    limit_s: float
    slow: str
    machine: bool = False


def ok(check: str, what: str) -> Finding:
    return Finding(check=check, state="ok", what=what)


def warning(check: str, what: str, mend: str) -> Finding:
    return Finding(check=check, state="warning", what=what, mend=mend)


def wrong(check: str, what: str, mend: str) -> Finding:
    return Finding(check=check, state="wrong", what=what, mend=mend)


def told(check: str, error: Exception) -> Finding:
    """An error of this program's own, whose message says after its last colon what to do."""
    words = first_mistake(error) if isinstance(error, ValueError) else str(error)
    what, _, mend = words.rpartition(": ")
    return wrong(check, what or words, mend if what else "see docs/sites.md")
