"""Only what may pass is tried again: as often, and after such waits, as its kind deserves."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PRELUDE = """
from types import SimpleNamespace
from prefect.states import Failed
from flows.retries import TASK, TRIES, WAITS_S, trouble, worth_another_try
def again(error, count):
    return worth_another_try(None, SimpleNamespace(run_count=count), Failed(data=error))
"""


def run(home: Path, program: str) -> list[str]:
    """In a process of its own: Prefect's folder is chosen when it is imported."""
    environment = os.environ | {"PREFECT_HOME": str(home / "prefect"), "HOME": str(home)}
    command = [sys.executable, "-c", PRELUDE + program]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_every_failure_has_its_kind(tmp_path):
    program = """
import sqlite3
import httpx
from mlflow.exceptions import MlflowException, RestException
from ray.exceptions import RayTaskError, WorkerCrashedError
from sqlalchemy.exc import IntegrityError, OperationalError
from diffusion.adapters.ray_train import TrainingFailed
from diffusion.store.publish import DiskFull
from diffusion.store.storage import StorageRefused, StorageUnavailable
class Mistake(ValueError): ...
kinds = {
    "mistake": [ValueError(), Mistake(), TypeError(), KeyError(), FloatingPointError(), StorageRefused("no bucket"),
        KeyboardInterrupt(), RayTaskError("f", "traceback", ValueError("bad")).as_instanceof_cause()],
    "disk": [OSError(28, "No space left on device"), OSError(30, "Read-only", "a"), DiskFull(28, "full"),
        FileNotFoundError(), PermissionError()],
    "network": [ConnectionError(), TimeoutError(), OSError(5, "I/O"), StorageUnavailable("away"),
        httpx.ConnectError("no"), sqlite3.OperationalError("database is locked"),
        OperationalError("select", {}, Exception("closed")), MlflowException("API request failed")],
    "ray": [WorkerCrashedError()],
    "final": [TrainingFailed("ended")],
    "unknown": [RuntimeError(), IntegrityError("insert", {}, Exception("twice")),
        RestException({"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "no such run"})],
}
assert kinds.keys() == TRIES.keys()
for kind, errors in kinds.items():
    for error in errors:
        assert trouble(error) == kind, (error, trouble(error))
"""
    run(tmp_path, program)


def test_each_kind_has_its_tries_and_people_hear_of_the_wait(tmp_path):
    program = """
assert TASK["retries"] == len(WAITS_S) >= max(TRIES.values()) - 1
assert list(WAITS_S) == sorted(WAITS_S)
kinds = {"network": ConnectionError("no answer\\nafter 3 tries"), "unknown": RuntimeError(), "mistake": ValueError()}
for kind, error in kinds.items():
    assert [again(error, count) for count in range(1, TRIES[kind] + 1)] == [True] * (TRIES[kind] - 1) + [False]
"""
    said = run(tmp_path, program)
    assert said[0] == "! ConnectionError (no answer after 3 tries): trying again in 2.0 s or somewhat more"
    assert len(said) == 4 + 2
    assert said[1].endswith("in 10.0 s or somewhat more")
