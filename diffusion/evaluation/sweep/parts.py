"""What a sweep's workers do, and what is kept of it: a part is measured once, whatever ends the process in between."""

import hashlib
import json
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy
import torch

from diffusion.evaluation.gathered import Result, Setup
from diffusion.evaluation.plan import Task
from diffusion.evaluation.worker import Worker
from diffusion.recipe import digest_of
from diffusion.store.publish import room_in, write_atomic


class SweepWorker:
    """Does the tasks of a sweep.  setups: one for each average, which is loaded when first asked for."""

    def __init__(self, setups: tuple[Setup, ...]) -> None:
        self.setups = {setup.recipe.ema: setup for setup in setups}
        self._workers: dict[float, Worker] = {}

    def __call__(self, task: Task) -> Result:
        """As `Worker`'s, by the bundle of the task's average; any, of a task that draws nothing."""
        ema = task.setting.ema if task.setting else next(iter(self.setups))
        if ema not in self._workers:
            self._workers[ema] = Worker(self.setups[ema])
        return self._workers[ema](task)


class Parts:
    """Features of drawing tasks in a folder, by what they are a function of.  They may be deleted: they are drawn again."""

    def __init__(self, folder: Path, setups: tuple[Setup, ...]) -> None:
        self.folder = Path(folder)
        self.setups = {setup.recipe.ema: setup for setup in setups}

    def find(self, task: Task) -> Result | None:
        """What a drawing task gave before, if it did.  Of a damaged file nothing is known."""
        path = self._path(task)
        if not path.exists():
            return None
        try:
            with safetensors.safe_open(path, framework="numpy") as file:
                facts, features = json.loads((file.metadata() or {}).get("facts", "{}")), file.get_tensor("features")
        except safetensors.SafetensorError:
            return None
        if facts.get("sha256") != _sha256(features):
            return None
        return Result(task.number, {"features": features}, seconds=facts["seconds"])

    def keep(self, task: Task, result: Result) -> None:
        """Remember what a drawing task gave, whole or not at all; not that it gave no pictures."""
        if not result.problem:
            features = np.ascontiguousarray(result.arrays["features"])
            facts = json.dumps({"sha256": _sha256(features), "seconds": result.seconds})
            part = safetensors.numpy.save({"features": features}, metadata={"facts": facts})
            with room_in(self.folder, "the features of drawn pictures"):
                write_atomic(self._path(task), part)

    def _path(self, task: Task) -> Path:
        setup = self.setups[task.setting.ema]
        key = digest_of(
            {
                "bundle": setup.bundle_digest,
                "task": task.model_dump(mode="json", exclude={"number"}),
                "extractor": setup.extractor.model_dump(),
                "torch": torch.__version__,
                "device": setup.device,
            }
        )
        return self.folder / f"{key}.safetensors"


def _sha256(features: np.ndarray) -> str:
    return hashlib.sha256(features.tobytes()).hexdigest()
