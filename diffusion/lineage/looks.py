"""A look at a file of a store: how many bytes that is, and what finds out whether they are the ones that were written."""

import hashlib
from collections.abc import Callable
from typing import Literal, NamedTuple

from diffusion.store.storage import Storage

_BLOCK = 2**23  # bytes read at a time

Tell = Callable[[int], None]  # hears of bytes that were looked at


class Finding(NamedTuple):
    """A file that is not as it was written, is not there, or that nothing names; and what to do about it."""

    kind: Literal["damaged", "missing", "unknown"]
    place: str
    what: str


class Look(NamedTuple):
    """A file, or a few, to be looked at: how many bytes that are, and what finds what is wrong with them."""

    place: str
    bytes: int
    work: Callable[[Tell], list[Finding]]


def sha256_of(root: Storage, name: str, tell: Tell) -> str:
    """sha256 of an object, read in blocks.  Raises FileNotFoundError."""
    digest, start = hashlib.sha256(), 0
    while block := root.read(name, start, _BLOCK):
        digest.update(block)
        start += len(block)
        tell(len(block))
        if len(block) < _BLOCK:
            break
    return digest.hexdigest()


def hashed(root: Storage, name: str, sha256: str, size: int | None, remedy: str) -> Look:
    """A look at one object that must have this sha256.  size: its bytes, None where it is missing."""
    place = f"{root.uri}/{name}"
    if size is None:
        return Look(place, 0, lambda _: [Finding("missing", place, remedy)])

    def work(tell: Tell) -> list[Finding]:
        actual = sha256_of(root, name, tell)
        if actual == sha256:
            return []
        return [Finding("damaged", place, f"sha256 {actual[:12]}, {sha256[:12]} was written. {remedy}")]

    return Look(place, size, work)


def said(kind: Literal["damaged", "missing", "unknown"], place: str, what: str) -> Look:
    """A look at what needs none any more."""
    return Look(place, 0, lambda _: [Finding(kind, place, what)])


def asked(place: str, size: int, check: Callable[[], object], remedy: str) -> Look:
    """A look by a function that raises ValueError where something is wrong.  remedy: what to do; none: the error says it."""

    def work(tell: Tell) -> list[Finding]:
        try:
            check()
        except ValueError as error:
            return [Finding("damaged", place, f"{error}{remedy and f'. {remedy}'}")]
        finally:
            tell(size)
        return []

    return Look(place, size, work)
