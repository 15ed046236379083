"""Processes as /proc has them, for what ends some of them."""

import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path


def descendants(pid: int) -> list[int]:
    """Its children, theirs, and so on."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found, todo = [], [pid]
    while todo:
        found += (own := children.get(todo.pop(), []))
        todo += own
    return found


def command_of(pid: int) -> str:
    """Its command line; empty where it has ended."""
    try:
        return Path("/proc", str(pid), "cmdline").read_text(errors="replace").replace("\0", " ")
    except OSError:
        return ""


def ours(command: str) -> list[int]:
    """Those that descend from this one and have this in their command line: other programs may run Ray beside us."""
    return [pid for pid in descendants(os.getpid()) if command in command_of(pid)]


def our_actors() -> list[int]:
    """Ray Data's, for what is done shard by shard."""
    return ours("MapWorker(Map(_Actor))")


def with_variable(name: str, value: str) -> list[int]:
    """Those that live with this variable of the environment, whoever started them."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"{name}={value}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:  # ended meanwhile, or another user's
            continue
    return found


def below(folder: Path) -> list[int]:
    """Those that live and name a file below this folder in their command line, or have one open, whoever started them: a
    process that gives itself a title, as Ray's do, writes it over its environment."""
    inside, found = f"{folder.resolve()}/", []
    for process in Path("/proc").glob("[0-9]*"):
        pid = int(process.name)
        if pid != os.getpid() and (
            inside in command_of(pid) or any(file.startswith(inside) for file in _open_files(pid))
        ):
            found.append(pid)
    return found


def _open_files(pid: int) -> Iterator[str]:
    with suppress(OSError):  # ended meanwhile, or another user's
        for link in Path("/proc", str(pid), "fd").iterdir():
            with suppress(OSError):
                yield os.readlink(link)


def kill(*pids: int) -> int:
    """Returns how many of them there were."""
    hit = 0
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
        hit += 1
    return hit
