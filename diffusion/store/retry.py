"""Asking again: how often, after what wait, and when to give up."""

import logging
import math
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from diffusion.store.storage import StorageUnavailable

T = TypeVar("T")


class Passing(Exception):
    """A failure that may be gone the next time.  `kind` is a few words to count by."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(f"{kind}: {detail}")
        self.kind = kind


@dataclass(frozen=True)
class Patience:
    """How long to wait for answers, and how often to ask again.

    Before attempt n + 1 we wait a uniform time in [0, min(longest_s, first_s 2^(n-1))], so that clients that failed
    together do not come back together ("full jitter", Brooker, Exponential Backoff And Jitter, AWS blog, 2015).
    """

    attempts: int = 8
    first_s: float = 0.2
    longest_s: float = 10.0
    total_s: float = 180.0  # after this no attempt begins
    connect_s: float = 5.0
    silent_s: float = 20.0  # without a byte
    slowest: float = 2.0**15  # bytes per second; an object that comes slower over `silent_s` is asked for again

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise ValueError(f"attempts={self.attempts}: there is at least one")

    def wait_s(self, failed: int) -> float:
        """Seconds to wait after `failed` attempts.  Random, and nothing but time depends on it."""
        return random.SystemRandom().uniform(0, min(self.longest_s, self.first_s * 2.0 ** min(failed - 1, 64)))


_SILENT_S = 3.0  # of waiting for an answer without a word about it
_TOLD_EVERY_S = 10.0
_log = logging.getLogger("diffusion.storage")
_lock = threading.Lock()
_last_told = -math.inf
_retried: Counter[str] = Counter()


def retries() -> Counter[str]:
    """How often this process asked again so far, by what had failed.  The difference of two calls is what lay between."""
    with _lock:
        return _retried.copy()


def ask(what: str, attempt: Callable[[], T], patience: Patience) -> T:
    """What `attempt` returns.  Where it raises Passing it is called again; in the end StorageUnavailable names `what`.

    A wait that people would notice is told to the log `diffusion.storage`.
    """
    began = time.monotonic()
    failed = 0
    while True:
        try:
            return attempt()
        except Passing as error:
            failed += 1
            wait_s = patience.wait_s(failed)
            passed_s = time.monotonic() - began
            if failed >= patience.attempts or passed_s + wait_s > patience.total_s:
                raise StorageUnavailable(
                    f"{what}: {error} (asked {failed} times in {passed_s:.1f} s). Nothing is lost: run the same command"
                    " again when the storage answers"
                ) from error
            with _lock:
                _retried[error.kind] += 1
            if passed_s + wait_s > _SILENT_S:
                _tell(f"{what}: {error} (asked {failed} times in {passed_s:.1f} s): asking again")
        time.sleep(wait_s)


def _tell(words: str) -> None:
    """To the log, now and then, though many threads wait at once."""
    global _last_told
    with _lock:
        if time.monotonic() - _last_told < _TOLD_EVERY_S:
            return
        _last_told = time.monotonic()
    _log.warning(words)
