"""A short look at this machine: a few real steps of the recipe's network on as many processes as will train, and the disk.

Seconds, and a folder of the system's for a moment; nothing else is left.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from diffusion.planning.trial import ASKED, Asked, Told
from diffusion.recipe import Recipe, canonical_json

BUDGET_S = 4.0  # of steps; half as much of answers
_PROCESSES_S = 180.0  # after which a probe has failed
_DISK_BYTES = 2**25
_ROOT = Path(__file__).parents[2]


class Probed(NamedTuple):
    """What processes that worked at once took, the mean of all."""

    start_s: float
    step_s: tuple[float, ...]  # the slowest process's, in turn
    answer_s: float
    feature_s: float | None
    core: float
    world: int


class NoProbe(RuntimeError):
    """The network could not be tried here.  Says why in one sentence."""


def probe(
    recipe: Recipe,
    *,
    resolution: int,
    classes: int,
    world: int,
    share: int,
    step_flops: float,
    threads: int,
    gpu: bool,
    budget_s: float = BUDGET_S,
) -> Probed:
    """Train, answer and extract on `world` processes of `threads` threads each, or a GPU each.  resolution: of the pictures.
    share: pictures of a step on each process, which cost step_flops.  Raises NoProbe."""
    train = recipe.train.model_copy(update={"init": None})  # the same network, from random weights
    asked = Asked(
        recipe=recipe.model_copy(update={"train": train}),
        resolution=resolution,
        classes=classes,
        world=world,
        share=share,
        step_flops=step_flops,
        threads=threads,
        gpu=gpu,
        budget_s=budget_s,
    )
    with tempfile.TemporaryDirectory(prefix="diffusion-plan-") as folder, ExitStack() as running:
        (Path(folder) / ASKED).write_bytes(canonical_json(asked))
        began = time.monotonic()
        processes = [running.enter_context(_Process(folder, rank, threads)) for rank in range(world)]
        told = [process.told(began + _PROCESSES_S) for process in processes]
    features = [one.feature_s for one in told if one.feature_s is not None]
    return Probed(
        start_s=max(one.ready for one in told) - began,
        step_s=tuple(max(turn) for turn in zip(*(one.step_s for one in told), strict=True)),
        answer_s=fmean(one.answer_s for one in told),
        feature_s=fmean(features) if features else None,
        core=fmean(one.core for one in told),
        world=world,
    )


class _Process:
    """A trial; it ends with the block."""

    def __init__(self, folder: str, rank: int, threads: int) -> None:
        environment = (
            {"GLOO_SOCKET_IFNAME": "lo"}
            | os.environ
            | {
                "PYTHONPATH": os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH")))),
                "OMP_NUM_THREADS": str(threads),
            }
        )
        self._errors = open(Path(folder) / f"{rank}.txt", "w+")  # noqa: SIM115  closed with the block
        self._process = subprocess.Popen(
            [sys.executable, "-m", "diffusion.planning.trial", folder, str(rank)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment,
            text=True,
        )

    def __enter__(self) -> "_Process":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def told(self, until: float) -> Told:
        try:
            said, _ = self._process.communicate(timeout=max(1.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise NoProbe(f"the network took no few steps in {_PROCESSES_S:.0f} s") from None
        lines = said.splitlines()
        if self._process.returncode or not lines:
            self._errors.seek(0)
            why = (self._errors.read().strip().splitlines() or ["it said nothing"])[-1]
            raise NoProbe(f"the network could not be tried here: {why}")
        return Told(**json.loads(lines[-1]))


def disk_bytes_s(folder: Path) -> float:
    """Bytes a second that are written to the disk of `folder`, or of what exists above it, and are there for certain."""
    nearest = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
    block = os.urandom(2**20)
    try:
        with tempfile.NamedTemporaryFile(dir=nearest, prefix=".tmp-plan-") as file:
            began = time.perf_counter()
            for _ in range(_DISK_BYTES // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            return _DISK_BYTES / (time.perf_counter() - began)
    except OSError as error:
        raise NoProbe(f"{nearest} cannot be written: {error.strerror}") from error
