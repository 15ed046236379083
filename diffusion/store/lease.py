"""A lease: one owner at a time of a piece of work, wherever the others are; a dead owner's ends by itself.

Everybody who wants it puts a claim of their own beside the others', and the bakery algorithm [Lamport 1974] says whose turn
it is: who comes takes a number above all that are there, and waits until nobody with a lower one is left.  So it needs of a
storage what every one has, to put, list, read and remove, and works in a folder as on any S3 server.  (Writing on a
condition, If-None-Match and If-Match, would be shorter; some servers lack it, and some have it without being atomic.)

A claim is a heartbeat too: a thread of its owner's changes it every `lease_s` / 6.  An owner is gone where its process has
ended, which shows at once on its own machine; one elsewhere where its claim has not changed for `lease_s` under the eyes of
who waits.  No two machines' clocks are compared.  An owner that was halted for so long learns it by `Lease.lost`: another
may be at the work, too.  What stages publish is named by its content and appears whole, so that costs time and no more.
"""

import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from diffusion.recipe import canonical_json
from diffusion.store.storage import LocalFolder, Storage, StorageRefused

FOLDER = "leases"  # below the root of a storage; what lies in it comes and goes, and nothing is named by it
LEASE_S = 60.0
_BEATS = 6  # in the length of a lease
_FIRST_LOOK_S = 0.1
_LAST_LOOK_S, _LAST_LOCAL_LOOK_S = 5.0, 0.5  # between two looks at who is before us


class Claim(BaseModel):
    """What an owner says of itself.  number: 0 while it is choosing one; beat: changes while it lives; began: when its
    process was started, in the system's ticks; holds: what it does that for, in its own words."""

    model_config = ConfigDict(frozen=True, extra="ignore")  # of a program of another version, too

    number: int
    beat: int
    host: str
    machine: str | None
    process: int
    began: int | None
    holds: str = ""

    @property
    def words(self) -> str:
        """For people."""
        return f"process {self.process} on {self.host}"

    @property
    def dead(self) -> bool:
        """Whether its process is known to have ended: it was one of this machine's."""
        return self.machine is not None and self.machine == machine() and not lives(self.process, self.began)


class Gone(Exception):
    """Our claim is not there any more: we were halted, and others have taken us for gone."""


class Lease:
    """A claim that is kept alive; of `leased` the right to do the work.  lost: another may be at it, too."""

    def __init__(self, storage: Storage, prefix: str, holds: str, lease_s: float) -> None:
        self.storage, self.lease_s, self.lost = storage, lease_s, False
        self.name = f"{prefix}{uuid.uuid4().hex}.json"
        own = os.getpid()
        self.claim = Claim(
            number=0, beat=0, host=socket.gethostname(), machine=machine(), process=own, began=began(own), holds=holds
        )
        self._said = _now()
        self._writing = threading.Lock()
        self._ended = threading.Event()

    def say(self, number: int | None = None) -> None:
        """Write the claim, with a number where one was chosen.  Raises Gone where others have removed it, and where the
        number was chosen too long ago."""
        with self._writing:
            if self._ended.is_set():
                return
            now, first = _now(), self.claim.beat == 0
            if not first and self.storage.size(self.name) is None:
                self.lost = True
                raise Gone(self.name)
            if not first and now - self._said > self.lease_s:
                self.lost = True
                if number is not None:
                    raise Gone(self.name)
            update = {"beat": self.claim.beat + 1} | ({} if number is None else {"number": number})
            claim = self.claim.model_copy(update=update)
            self.storage.put(self.name, canonical_json(claim))
            if not first and _now() - self._said > self.lease_s:  # halted, or the storage was
                self.lost = True
            self.claim, self._said = claim, now

    def beat(self) -> None:
        """Keep the claim alive until `end`.  A storage that does not answer is asked again at the next beat."""
        while not self._ended.wait(self.lease_s / _BEATS):
            try:
                self.say()
            except Gone:
                return
            except (OSError, StorageRefused):
                continue

    def end(self) -> None:
        """Remove the claim.  Where the storage does not answer, it ends by itself."""
        with self._writing:
            self._ended.set()
            clear(self.storage, self.name)


class Watch:
    """Looks at the claims of a key, and tells which owners are gone."""

    def __init__(self, storage: Storage, key: str, lease_s: float = LEASE_S) -> None:
        self.storage, self.prefix, self.lease_s = storage, _prefix(key), lease_s
        self._seen: dict[str, tuple[bytes, float]] = {}  # what a claim says, and for how long it has said so
        self._looked = _now()

    def look(self) -> dict[str, Claim]:
        """Name -> claim of all that are there.  One that is no claim keeps nobody waiting, and is removed in the end."""
        now = _now()
        # at most: we may have been halted ourselves, or the storage was away
        passed_s = min(now - self._looked, 2 * _LAST_LOOK_S)
        found, seen = {}, {}
        # a folder's listing may lack for a moment what is being replaced in it
        for name in sorted({entry.name for entry in self.storage.walk(self.prefix)} | self._seen.keys()):
            try:
                data = self.storage.read(name)
            except FileNotFoundError:
                continue
            before, age_s = self._seen.get(name, (None, 0.0))
            seen[name] = (data, age_s + passed_s if before == data else 0.0)
            with suppress(ValueError):
                found[name] = Claim.model_validate_json(data)
        self._seen, self._looked = seen, now
        return found

    def gone(self) -> list[str]:
        """Names of the claims of the last look whose owners are."""
        return [name for name, (data, age_s) in self._seen.items() if age_s > self.lease_s or _dead(data)]


@contextmanager
def claimed(storage: Storage, key: str, *, holds: str = "", lease_s: float = LEASE_S) -> Iterator[Lease]:
    """Say for the length of the block that this process lives.  Raises what the storage does."""
    lease = Lease(storage, _prefix(key), holds, lease_s)
    lease.say()
    threading.Thread(target=lease.beat, daemon=True, name="lease").start()
    try:
        yield lease
    finally:
        lease.end()


@contextmanager
def leased(
    storage: Storage,
    key: str,
    *,
    holds: str = "",
    lease_s: float = LEASE_S,
    wait: Callable[[Claim], None] = lambda claim: None,
    patience_s: float | None = None,
) -> Iterator[Lease]:
    """Alone at the work `key` for the length of the block.  It waits for its turn, at most `patience_s`.

    wait: hears of each other owner that is waited for, once.  Raises TimeoutError, and what the storage does.
    """
    deadline = None if patience_s is None else _now() + patience_s
    told: set[str] = set()
    while True:
        with claimed(storage, key, holds=holds, lease_s=lease_s) as lease:
            try:
                for before in _turn(lease, Watch(storage, key, lease_s)):
                    if before.words not in told:
                        told.add(before.words)
                        wait(before)
                    if deadline is not None and _now() > deadline:
                        raise TimeoutError(f"{before.words} does this work and does not end: look whether it hangs")
            except Gone:
                continue  # with a new number
            yield lease
            return


def _turn(lease: Lease, watch: Watch) -> Iterator[Claim]:
    """Take a number and wait for it.  Yields who is before us, after each look.  Raises Gone."""
    others = watch.look()
    lease.say(1 + max((claim.number for claim in others.values()), default=0))
    longest_s = _LAST_LOCAL_LOOK_S if isinstance(lease.storage, LocalFolder) else _LAST_LOOK_S
    longest_s, look_s = min(longest_s, lease.lease_s / _BEATS), _FIRST_LOOK_S
    while True:
        claims = watch.look()
        if lease.lost or lease.name not in claims:
            raise Gone(lease.name)
        for name in watch.gone():
            clear(lease.storage, name)
            claims.pop(name, None)
        own = (lease.claim.number, lease.name)
        first = min((claim.number, name) for name, claim in claims.items())  # 0: it is choosing
        if first == own:
            return
        yield claims[first[1]]
        time.sleep(look_s)
        look_s = min(2 * look_s, longest_s)


def clear(storage: Storage, name: str) -> None:
    """Remove a claim, if the storage answers: who looks next does it otherwise."""
    with suppress(OSError, StorageRefused):
        storage.remove(name)


def machine() -> str | None:
    """What tells apart machines, and containers whose processes have numbers of their own; None where nothing does."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def lives(process: int, since: int | None = None) -> bool:
    """Whether a process of this machine does.  since: as `began` said of it: another one may have its number by now."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user
        pass
    now = began(process)
    return now != 0 and (None in (now, since) or now == since)


def began(process: int) -> int | None:
    """When a process of this machine was started, in the system's ticks; 0: it has ended, and its parent has not asked.
    None where the system does not say."""
    try:
        state, *fields = Path("/proc", str(process), "stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    return 0 if state in "ZX" else int(fields[18])


def _prefix(key: str) -> str:
    return f"{FOLDER}/{key}."


def _dead(data: bytes) -> bool:
    try:
        return Claim.model_validate_json(data).dead
    except ValueError:
        return False


def _now() -> float:
    """Seconds; the computer's sleep counts where the system can tell."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))
