"""A registration in a process of its own, which kills itself at one of its requests."""

import multiprocessing
import os
import re
import signal
from collections.abc import Callable
from typing import NamedTuple

import urllib3.connectionpool

from diffusion.adapters import mlflow_registry
from diffusion.adapters.mlflow_tracking import Tracking
from diffusion.evaluation.gate.gate import Verdict
from diffusion.recipe import EvaluateRecipe
from diffusion.store.refs import EvaluationRef

_LOADED = ["tests.killed_registration", "mlflow.pyfunc", "torch", "boto3"]


class Moment(NamedTuple):
    """One of a process's requests to servers.  The process hears of its answer, or does not even ask."""

    method: str  # "": any
    path: str  # a regular expression
    answered: bool = False
    number: int = 1  # of those that are so


def at(moment: Moment, act: Callable[[], None]) -> None:
    """Have this process call `act` at the moment."""
    ask, seen = urllib3.connectionpool.HTTPConnectionPool.urlopen, 0

    def asked(self, method, url, *arguments, **more):
        nonlocal seen
        here = moment.method in ("", method) and re.search(moment.path, url) is not None
        seen += here
        here = here and seen == moment.number
        if here and not moment.answered:
            act()
        answer = ask(self, method, url, *arguments, **more)
        if here and moment.answered:
            act()
        return answer

    urllib3.connectionpool.HTTPConnectionPool.urlopen = asked


def registration(
    moment: Moment, tracking: Tracking, evaluation: EvaluationRef, verdict: Verdict, name: str, recipe: EvaluateRecipe
) -> int:
    """Register in a new process that is killed at the moment.  Returns its exit status: -9, or 0 where it came to its end
    before."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_LOADED)
    process = context.Process(
        target=_register, args=(moment, dict(os.environ), os.getcwd(), tracking, evaluation, verdict, name, recipe)
    )
    process.start()
    process.join()
    return process.exitcode


def _register(moment: Moment, environment: dict[str, str], folder: str, *what: object) -> None:
    os.environ.update(environment)
    os.chdir(folder)
    at(moment, lambda: os.kill(os.getpid(), signal.SIGKILL))
    mlflow_registry.register(*what)
