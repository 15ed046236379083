"""Which failures of a stage are tried again, how often and after what wait: decided here and nowhere else.

- a mistake of the recipe, the source, the data, the program: never, for the next try would find the same
- the disk, full, read-only or not ours: never
- what was tried again by who raises it, as Ray Train replaces its workers (`final = True` in its class): never
- the network: a storage, a database or MLflow did not answer; such come back within minutes
- Ray: a node, a worker or an actor died, and Ray's own tries were not enough
- anything else: nobody knows

`TRIES` says how many tries each has in all, `WAITS_S` how long it is waited before the second one, the third ..., by up to
a half longer at random: who failed together does not come back together.
"""

import errno

from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.tasks import Task

from flows.console import seconds, warn

TRIES = {"mistake": 1, "disk": 1, "final": 1, "network": 5, "ray": 3, "unknown": 3}
WAITS_S = (2.0, 10.0, 30.0, 60.0)
_JITTER = 0.5
_REASON = 200  # characters of an error of which a second try is made

_MISTAKES = (ValueError, TypeError, LookupError, ArithmeticError, AssertionError, ImportError, AttributeError)
_DISKS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_FILES = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError)
_CLIENTS = {"botocore", "urllib3", "requests", "httpx", "httpcore", "websockets"}
_DATABASES = {"sqlalchemy", "sqlite3", "psycopg"}
_DATABASE_AWAY = {"OperationalError", "InterfaceError", "TimeoutError", "DisconnectionError"}
_MLFLOW_AWAY = {"INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "DEADLINE_EXCEEDED", "ABORTED"}


def trouble(error: object) -> str:
    """The class of a failure, one of TRIES."""
    if getattr(error, "final", False):
        return "final"
    if not isinstance(error, Exception) or isinstance(error, _MISTAKES):  # no Exception: an interruption
        return "mistake"
    if isinstance(error, OSError) and (error.errno in _DISKS or isinstance(error, _FILES)):
        return "disk"
    kinds = type(error).__mro__
    homes = {kind.__module__.partition(".")[0] for kind in kinds}
    if "ray" in homes:
        return "ray"
    away = (
        isinstance(error, OSError)  # what a storage of ours says is one, too
        or homes & _CLIENTS
        or (homes & _DATABASES and {kind.__name__ for kind in kinds} & _DATABASE_AWAY)
        or ("mlflow" in homes and getattr(error, "error_code", None) in _MLFLOW_AWAY)
    )
    return "network" if away else "unknown"


def worth_another_try(_task: Task, run: TaskRun, state: State) -> bool:
    """Whether a failure may be gone the next time, and has not come too often."""
    error = state.result(raise_on_failure=False)
    if run.run_count >= TRIES[trouble(error)]:
        return False
    reason = " ".join(str(error).split())[:_REASON]
    wait_s = WAITS_S[max(run.run_count, 1) - 1]
    warn(
        f"{type(error).__name__}{f' ({reason})' if reason else ''}: trying again in {seconds(wait_s)} or somewhat more"
    )
    return True


TASK = {
    "cache_policy": NO_CACHE,
    "retries": len(WAITS_S),
    "retry_delay_seconds": list(WAITS_S),
    "retry_jitter_factor": _JITTER,
    "retry_condition_fn": worth_another_try,
}
