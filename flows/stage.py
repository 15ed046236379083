"""What all stages share: finished work is not done twice, transient failures are tried again, artifacts are small."""

import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.tasks import Task, exponential_backoff

from diffusion.recipe import Frozen, digest_of
from diffusion.store.refs import DatasetRef, EvaluationRef, ModelRef, RunRef, SweepRef
from diffusion.store.works import recall, remember, work_path
from flows.console import say, seconds, ticked, warn
from flows.foreground import ending_soon
from flows.site import Site

Ref = TypeVar("Ref", DatasetRef, RunRef, SweepRef, EvaluationRef, ModelRef)


class Done(Frozen, Generic[Ref]):
    """A stage's reference, and whether it took any work."""

    stage: str
    ref: Ref
    seconds: float
    reused: bool


def once(
    stage: str,
    key: str,
    kind: type[Ref],
    site: Site,
    make: Callable[[], Ref],
    *,
    now: Callable[[Ref], Ref | None] = lambda ref: ref,
    tell: Callable[[Ref], object] | None = None,
) -> Done[Ref]:
    """The reference of the work `key`: recalled where it is finished, made and remembered where not.

    now: a recalled reference as it stands today, None where what it names is gone from outside the store.  tell: others of
    what was made, before the work is finished; where that fails the next try tells and makes nothing.  Of several processes
    that want the same work one does it and the others wait.
    """
    started = time.monotonic()
    with ending_soon(), _alone(stage, key, site):
        ref = recall(site.store, key, kind)
        ref = ref and now(ref)
        reused = ref is not None
        if ref is None:
            ref = make() if tell is None else _made(key, kind, site, make)
            if tell is not None:
                tell(ref)
            remember(site.store, key, ref)
    done = Done[kind](stage=stage, ref=ref, seconds=time.monotonic() - started, reused=reused)
    ticked(f"{stage:<9} " + ("done before, not done again" if reused else seconds(done.seconds)))
    return done


def _made(key: str, kind: type[Ref], site: Site, make: Callable[[], Ref]) -> Ref:
    """What `make` gives, noted at once under a key of its own, or what that note says."""
    made = digest_of({"made": key})
    return recall(site.store, made, kind) or remember(site.store, made, make())


@contextmanager
def _alone(stage: str, key: str, site: Site) -> Iterator[None]:
    path = work_path(site.store, key).with_suffix(".lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+") as lock:  # the system releases it when this process ends, however it ends
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            say(f"  {stage:<9} process {lock.read().strip()} does this work already: waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


# The next try would find the same mistake: in the recipe, the source, the data, the program.
_PERMANENT = (ValueError, TypeError, LookupError, ArithmeticError, AssertionError, ImportError, AttributeError)
_REASON = 200  # characters of an error of which a second try is made
_PERMANENT_DISKS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_PERMANENT_FILES = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError)


def worth_another_try(_task: Task, _run: TaskRun, state: State) -> bool:
    """Whether a failure may be gone the next time: a worker that died, a connection, a locked database."""
    error = state.result(raise_on_failure=False)
    if isinstance(error, (*_PERMANENT, *_PERMANENT_FILES)) or not isinstance(error, Exception):
        return False
    if isinstance(error, OSError) and error.errno in _PERMANENT_DISKS:
        return False
    reason = " ".join(str(error).split())[:_REASON]
    warn(f"{type(error).__name__}{f' ({reason})' if reason else ''}: trying again in a moment")
    return True


TASK = {
    "cache_policy": NO_CACHE,
    "retries": 2,
    "retry_delay_seconds": exponential_backoff(backoff_factor=2),
    "retry_jitter_factor": 0.5,
    "retry_condition_fn": worth_another_try,
}
