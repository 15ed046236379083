"""All checks at once, each with its time: what one finds is told though another fails or hangs."""

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from diffusion.store.storage import StorageUnavailable
from flows.doctor.checks import CHECKS
from flows.doctor.finding import Asked, Check, Finding, told, wrong


def examine(asked: Asked, checks: Sequence[Check] = CHECKS) -> Iterator[Finding]:
    """The findings in the order of the checks, each as soon as those before it are there."""
    began = time.monotonic()
    for running in [_Running(check, asked) for check in checks]:
        running.ended.wait(max(0.0, began + running.check.limit_s - time.monotonic()))
        yield from running.all()


@dataclass
class _Running:
    """A check in a thread of its own, which is left alone where it takes too long: it ends with the program."""

    check: Check
    asked: Asked
    found: list[Finding] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        threading.Thread(target=self._run, daemon=True, name=f"doctor-{self.check.name}").start()

    def all(self) -> list[Finding]:
        found = list(self.found)
        if not self.ended.is_set():
            what = f"no end within {self.check.limit_s:g} s"
            found.append(wrong(self.check.name, what, self.check.slow))
        return found

    def _run(self) -> None:
        try:
            for finding in self.check.run(self.asked):
                self.found.append(finding)
        except (ValueError, ConnectionError, StorageUnavailable) as error:
            self.found.append(told(self.check.name, error))
        except Exception as error:  # of a library, and in its words: the other checks go on
            what = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            self.found.append(wrong(self.check.name, what, "see docs/sites.md; the check itself may be at fault"))
        finally:
            self.ended.set()
