"""API keys: who may ask an endpoint, how often, and how much at once.

A key is `dk-` and 32 random bytes.  The file keeps its sha256 alone: nobody tries 2^256 keys, so the slow, salted hashes
that passwords need would cost each request milliseconds and add nothing.  A request is compared with all keys in constant
time.
"""

import hashlib
import hmac
import ipaddress
import json
import logging
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from pydantic import Field

from diffusion.recipe import Frozen, first_mistake
from diffusion.serving.priority import Priority
from diffusion.store.publish import folder_locked, write_atomic

PREFIX = "dk-"
FILE = "keys.json"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")  # it stands in logs and metrics
_log = logging.getLogger(__name__)


class Key(Frozen):
    """What is kept of a key.  The key itself is not."""

    name: str = Field(pattern=f"^{_NAME.pattern}$")
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    made: str  # ISO 8601, UTC
    rate: float | None = Field(None, gt=0, description="Requests for pictures a minute; null: any number")
    concurrency: int | None = Field(None, ge=1, description="Requests for pictures at once; null: any number")
    priority: Priority = Field(
        "normal", description="The highest that its requests may have, and do where they do not say"
    )


class _File(Frozen):
    keys: tuple[Key, ...] = ()


class Access(Frozen):
    """Who may ask an endpoint: whoever has a key of the file `keys`; anybody where it has none, unless one is `needed`."""

    keys: Path | None = None
    needed: bool = False
    by_any_name: bool = False  # whatever host a request names; else, where no key is wanted, this machine alone


class NoKey(Exception):
    """No key was sent, or one that is not known."""


class TooMany(Exception):
    """The key has used up what it may.  In `retry_after_s` seconds it may ask again."""

    def __init__(self, message: str, reason: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.reason, self.retry_after_s = reason, retry_after_s  # reason: rate or concurrency


def read(path: Path) -> tuple[Key, ...]:
    """The keys in a file; none where there is no file.  Raises ValueError for one that is damaged or cannot be read."""
    try:
        return _File.model_validate_json(path.read_bytes()).keys
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): it holds the endpoint's keys") from None
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged ({first_mistake(error)}): put back a copy, or delete it and make keys anew with"
            " `diffusion keys add NAME`"
        ) from None


def add(
    path: Path, name: str, rate: float | None = None, concurrency: int | None = None, priority: Priority = "normal"
) -> str:
    """Make a key and keep its hash.  rate: requests a minute; concurrency: at once.  Returns the key, which is nowhere else.

    Raises ValueError for a name that is taken, or no name, for limits that are none, and a priority that is none.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name of a key: up to 64 letters, digits, dots, underscores and hyphens")
    secret = PREFIX + secrets.token_urlsafe(32)
    made = datetime.now(UTC).isoformat(timespec="seconds")
    try:
        key = Key(name=name, sha256=_hash(secret), made=made, rate=rate, concurrency=concurrency, priority=priority)
    except ValueError as error:
        raise ValueError(first_mistake(error)) from None
    with folder_locked(path.parent):
        keys = read(path)
        if any(other.name == name for other in keys):
            raise ValueError(f"there is a key {name} already: choose another name, or `diffusion keys remove {name}`")
        _write(path, (*keys, key))
    return secret


def remove(path: Path, name: str) -> tuple[Key, ...]:
    """Forget a key; a running endpoint refuses it from the next request on.  Returns those that are left."""
    with folder_locked(path.parent):
        keys = read(path)
        left = tuple(key for key in keys if key.name != name)
        if left == keys:
            raise ValueError(f"there is no key {name}: {', '.join(key.name for key in keys) or 'there is none at all'}")
        _write(path, left)
    return left


def is_loopback(host: str) -> bool:
    """Whether only programs of the same machine reach this address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Bucket:
    """Tokens that come `per_minute` and are kept up to a minute's worth, at least one: over t seconds it gives at most
    max(1, per_minute) + per_minute t / 60 of them."""

    def __init__(self, per_minute: float, now_s: float) -> None:
        self.per_second, self.size = per_minute / 60, max(1.0, per_minute)
        self.left, self.at = self.size, now_s

    def take(self, now_s: float) -> float:
        """Take one.  Returns 0, or, where there is none, the seconds until there is."""
        self.left = min(self.size, self.left + max(0.0, now_s - self.at) * self.per_second)
        self.at = max(self.at, now_s)
        if self.left >= 1:
            self.left -= 1
            return 0.0
        return (1 - self.left) / self.per_second


class _Use:
    """What a key has taken here."""

    def __init__(self, key: Key, now_s: float) -> None:
        self.bucket = None if key.rate is None else Bucket(key.rate, now_s)
        self.running = 0


class Keyring:
    """The keys as the file has them now: it is read again when it changed.  For one thread, such as an event loop.

    A file that is damaged or gone leaves the keys that were known, so that nothing opens an endpoint but removing its keys.
    Raises ValueError for a file that is damaged from the beginning.
    """

    def __init__(self, access: Access, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.access, self.clock = access, clock
        self._uses: dict[str, _Use] = {}
        self._seen = self._stamp()
        self._keys = read(access.keys) if access.keys else ()

    @property
    def wanted(self) -> bool:
        """Whether a key is wanted now."""
        self._follow()
        return self.access.needed or bool(self._keys)

    def holder(self, secret: str | None) -> Key:
        """Whose key it is.  Raises NoKey."""
        self._follow()
        if secret is None:
            raise NoKey("an API key is wanted: send `Authorization: Bearer KEY` (`diffusion keys add NAME` makes one)")
        digest, found = _hash(secret), None
        for key in self._keys:  # all of them, so that the time tells nothing
            if hmac.compare_digest(key.sha256, digest):
                found = key
        if found is None:
            raise NoKey("this API key is not known here: it was removed, or is of another server")
        return found

    @contextmanager
    def using(self, key: Key) -> Iterator[None]:
        """For the length of a request for pictures.  Raises TooMany."""
        now = self.clock()
        use = self._uses.setdefault(key.sha256, _Use(key, now))
        if key.concurrency is not None and use.running >= key.concurrency:
            what = f"the key {key.name} may ask for {key.concurrency} at once, and has {use.running} in work"
            raise TooMany(f"{what}: wait for one of them", "concurrency", 1)
        if use.bucket and (wait_s := use.bucket.take(now)):
            seconds = max(1, -int(-wait_s // 1))
            what = f"the key {key.name} may ask {key.rate:g} times a minute"
            raise TooMany(f"{what}: ask again in {seconds} s", "rate", seconds)
        use.running += 1
        try:
            yield
        finally:
            use.running -= 1

    def _follow(self) -> None:
        if (stamp := self._stamp()) == self._seen:
            return
        self._seen = stamp
        if stamp is None:
            _log.warning("%s is gone: the keys that were known stay until it is back", self.access.keys)
            return
        try:
            self._keys = read(self.access.keys)
        except ValueError as error:
            _log.warning("%s. The keys that were known stay", error)
            return
        known = {key.sha256 for key in self._keys}
        self._uses = {sha256: use for sha256, use in self._uses.items() if sha256 in known}

    def _stamp(self) -> tuple[int, int, int] | None:
        """Changes when the file does."""
        try:
            found = os.stat(self.access.keys) if self.access.keys else None
        except OSError:
            return None
        return found and (found.st_mtime_ns, found.st_ino, found.st_size)


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode(errors="surrogateescape")).hexdigest()


def _write(path: Path, keys: tuple[Key, ...]) -> None:
    text = json.dumps(_File(keys=keys).model_dump(mode="json"), indent=1)
    write_atomic(path, f"{text}\n".encode(), mode=0o600)
