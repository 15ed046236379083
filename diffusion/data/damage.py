"""Damaged pictures of a dataset: counted, named, and only so many of them."""

from collections import deque
from threading import Lock
from typing import NamedTuple

MAX_DAMAGED = 0.001  # of a split


class Damage(NamedTuple):
    """What could not be read, although it was read again.  A shard that is lost has its pictures as one such record, with
    no key."""

    shard: str  # its tar, in the data root
    key: str
    reason: str
    pictures: int


class TooMuchDamage(ValueError):
    """More pictures are damaged than is allowed.  Names shard, key and command."""


class DamageLog:
    """The damage met so far, by the index of each picture.  Safe to use from several threads.

    A picture counts once, however often it comes.  Allowed is a share of the split, at least one picture where any share
    is: in a small set one flipped bit should not end a night's run either, and a lost shard, many pictures at once, ends
    it unless the set is so large that the shard is within the share.
    """

    def __init__(self, pictures: int, share: float) -> None:
        if not 0 <= share < 1:
            raise ValueError(f"max_damaged={share}: a share of the pictures, from 0 (none) to below 1")
        self.allowed = max(1, int(share * pictures)) if share else 0
        self.of = pictures
        self.count = 0
        self.news: deque[Damage] = deque()  # what nobody has been told yet
        self._known: dict[range, str] = {}  # with what to say of it
        self._lock = Lock()

    def known(self, pictures: range) -> bool:
        """Whether it was noted before.  Raises TooMuchDamage as `note` did, so that nobody goes on beyond the limit."""
        if pictures not in self._known:
            return False
        self._check(pictures)
        return True

    def note(self, pictures: range, damage: Damage, advice: str) -> None:
        """Count it, where it is new.  Raises TooMuchDamage, which says `advice`, where it is too much."""
        with self._lock:
            if pictures not in self._known:
                self._known[pictures] = advice
                self.count += damage.pictures
                self.news.append(damage)
        self._check(pictures)

    def _check(self, pictures: range) -> None:
        if self.count > self.allowed:
            sums = (
                f"{self.count:,} of {self.of:,} pictures are damaged, and {self.allowed:,} are allowed; one of them: "
            )
            raise TooMuchDamage((sums if self.allowed else "") + self._known[pictures])
