"""One process at a time on a registered model, wherever the others are: a lock made of MLflow's tags alone.

MLflow compares and sets nothing in one step, but every process may write a tag of its own and read all others'.  That is
enough for the bakery algorithm [Lamport 1974]: who comes takes a number above all that are there, and waits until nobody
with a lower one is left.  A tag also says until when its owner may be waited for, by the clocks of the machines, which
should agree to within seconds, and where it runs, so that on one machine a killed process is not waited for at all.
"""

import json
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from diffusion.recipe import Frozen
from diffusion.store.lease import lives, machine

if TYPE_CHECKING:
    from mlflow import MlflowClient

PREFIX = "seat."
LEASE_S = 120.0  # a process that said nothing for so long is gone
PATIENCE_S = 900.0
_POLL_S = 0.05


class SeatTaken(RuntimeError):
    """Others kept the seat, or this process was halted for longer than the others wait."""


class _Claim(Frozen):
    """What a tag says.  number: 0 while its owner is choosing one."""

    number: int
    until: float  # seconds since 1970
    machine: str | None
    process: int

    @property
    def gone(self) -> bool:
        """Whether its owner has died, or said nothing for too long."""
        if self.until < time.time():
            return True
        return self.machine is not None and self.machine == machine() and not lives(self.process)


@dataclass
class Seat:
    """The right to change a model's alias.  It ends by itself after LEASE_S."""

    since: float  # of the monotonic clock

    def check(self) -> None:
        """Call it before each write.  Raises SeatTaken where another may have the seat by now."""
        if time.monotonic() - self.since > LEASE_S / 2:
            raise SeatTaken(f"this process was halted for more than {LEASE_S / 2:g} s and gave up its turn: try again")


@contextmanager
def seat(client: "MlflowClient", name: str, *, patience_s: float = PATIENCE_S) -> Iterator[Seat]:
    """Alone on the registered model `name` for the length of the block.  Raises SeatTaken after `patience_s`."""
    key = PREFIX + uuid.uuid4().hex
    deadline = time.monotonic() + patience_s
    try:
        while (since := _turn(client, name, key, deadline)) is None:
            pass  # it was halted for too long: the others may have taken it for gone, so it takes a new number
        yield Seat(since)
    finally:
        with suppress(Exception):  # then it ends by itself, and what was done is done
            client.delete_registered_model_tag(name, key)


def _turn(client: "MlflowClient", name: str, key: str, deadline: float) -> float | None:
    """Take a number and wait for it.  Returns when it was last said that this process is there; None: too long ago."""
    began = _say(client, name, key, 0)
    own = 1 + max((claim.number for claim in _others(client, name, key).values()), default=0)
    said = _say(client, name, key, own)
    if said - began > LEASE_S / 2:
        return None
    while True:
        others = _others(client, name, key)
        ahead = [other for other, claim in others.items() if (claim.number, other) < (own, key)]  # 0: it is choosing
        now = time.monotonic()
        if now - said > LEASE_S / 2:
            return None
        if not ahead:
            return said
        if now > deadline:
            who = others[ahead[0]]
            raise SeatTaken(
                f"process {who.process}{f' of {who.machine}' if who.machine else ''} is at the aliases of {name!r} and does"
                f" not end: look whether it hangs, or remove the tag {ahead[0]} of that model, and try again"
            )
        if now - said > LEASE_S / 8:
            said = _say(client, name, key, own)
        time.sleep(_POLL_S)  # MLflow tells nobody of a change


def _say(client: "MlflowClient", name: str, key: str, number: int) -> float:
    """Write the tag; returns when, before it was written, by the monotonic clock."""
    now = time.monotonic()
    claim = _Claim(number=number, until=time.time() + LEASE_S, machine=machine(), process=os.getpid())
    client.set_registered_model_tag(name, key, claim.model_dump_json())
    return now


def _others(client: "MlflowClient", name: str, key: str) -> dict[str, _Claim]:
    """Tag -> claim of each other process that is there.  The tags of those that are gone are removed."""
    there = {}
    for other, value in client.get_registered_model(name).tags.items():
        if not other.startswith(PREFIX) or other == key:
            continue
        claim = _Claim.model_validate(json.loads(value))
        if not claim.gone:
            there[other] = claim
            continue
        with suppress(Exception):  # another process removes it as well
            client.delete_registered_model_tag(name, other)
    return there
