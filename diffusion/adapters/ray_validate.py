"""Validation while training: published checkpoints are looked at by a Ray task beside the run, one at a time.

It never delays or fails the run: the task has a process of its own at the lowest priority, claims none of Ray's CPUs, which
a worker that is replaced may need, and what goes wrong in it is told and left.  Where it is slower than checkpoints come,
the newest is next, and what is not measured when the run ends is not measured.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import RayError

from diffusion.data.reading import Reading
from diffusion.evaluation.quick import look, named
from diffusion.recipe import EvaluateRecipe, TrainRecipe, digest_of
from diffusion.store.averages import MANIFEST_NAME
from diffusion.store.publish import sha256_file
from diffusion.store.refs import DatasetRef, EvaluationRef, RunRef
from diffusion.training.checkpoint import folders_in
from diffusion.training.journal import Journal, judged_in
from diffusion.training.step import end_of


class Validation:
    """The driver's side.  `hear` takes the events of `train_run`, `turn` is called now and then; neither waits.

    What is begun goes to the run's metrics.jsonl as {"event": "validating", ...}; what is found, once, as "validated", and
    to on_result; what went wrong as "validation_failed", and to on_event.  After a restart only checkpoints whose numbers
    were not told are looked at, and none that was measured already is measured again.
    """

    def __init__(
        self,
        run_dir: Path,
        train: TrainRecipe,
        dataset: DatasetRef,
        recipe: EvaluateRecipe,
        *,
        reading: Reading = Reading(),
        on_result: Callable[[EvaluationRef], None],
        on_event: Callable[[dict[str, Any]], None],
    ) -> None:
        """recipe: of `evaluation.quick.quick`."""
        self._run_dir, self._train, self._dataset, self._recipe = Path(run_dir).resolve(), train, dataset, recipe
        self._reading, self._on_result, self._on_event = reading, on_result, on_event
        self._waiting: dict[int, RunRef] = {}
        self._running: tuple[ray.ObjectRef, RunRef] | None = None
        self._heard: set[int] | None = None  # moments that need nothing more; None: metrics.jsonl was not asked yet

    def hear(self, event: dict[str, Any]) -> None:
        if event["event"] == "checkpoint":
            self._want(Path(event["uri"]), event["digest"])
        elif event["event"] == "resumed":
            for folder in folders_in(self._run_dir / "checkpoints"):
                if int(folder.name) <= event["images_seen"]:
                    with suppress(FileNotFoundError):  # workers train by now: it may be superseded at any moment
                        self._want(folder, sha256_file(folder / MANIFEST_NAME))
        self.turn()

    def turn(self) -> None:
        """Take what is finished and start what is next."""
        if self._running:
            if not ray.wait([self._running[0]], timeout=0)[0]:
                return
            self._take(*self._running)
            self._running = None
        if self._waiting:
            checkpoint = self._waiting.pop(max(self._waiting))
            root = str(self._run_dir / "validation")
            # told first: by this those who delete checkpoints leave it alone
            self._tell({"event": "validating", "images_seen": checkpoint.images_seen})
            self._running = _look.remote(checkpoint, self._recipe, root, self._reading), checkpoint

    def close(self) -> None:
        """Take what is finished and leave the rest."""
        self._waiting.clear()
        with suppress(RayError):  # where Ray has ended before
            self.turn()
            if self._running:
                ray.cancel(self._running[0], force=True)

    def _want(self, folder: Path, digest: str) -> None:
        images = int(folder.name)
        if self._heard is None:
            self._heard = set(judged_in(self._run_dir / "metrics.jsonl").told)
        if images in self._heard or images >= end_of(self._train):  # the last one is evaluated in full
            return
        self._heard.add(images)
        self._waiting[images] = RunRef(
            uri=str(folder),
            digest=digest,
            recipe_digest=digest_of(self._train),
            dataset=self._dataset,
            images_seen=images,
        )

    def _take(self, running: ray.ObjectRef, checkpoint: RunRef) -> None:
        try:
            found: EvaluationRef = ray.get(running)
        except RayError as error:
            event = {"event": "validation_failed", "images_seen": checkpoint.images_seen, "reason": reason_of(error)}
            self._on_event(event)
        else:
            facts = {"images_seen": checkpoint.images_seen, "recipe": digest_of(self._recipe), "uri": found.uri}
            event = {"event": "validated"} | facts | named(found)
            self._on_result(found)
        self._tell(event)

    def _tell(self, event: dict[str, Any]) -> None:
        Journal(self._run_dir / "metrics.jsonl").event(event)


@contextmanager
def validating(*args: Any, **kwargs: Any) -> Iterator[Validation]:
    """A `Validation` for the length of the block."""
    validation = Validation(*args, **kwargs)
    try:
        yield validation
    finally:
        validation.close()


def reason_of(error: RayError) -> str:
    """Why a task failed, in a line: the last of its cause's words, or, of one without words, its kind."""
    cause = getattr(error, "cause", None) or error
    return (str(cause).splitlines() or [type(cause).__name__])[-1]


# a process of its own, whose priority ends with it; no CPU of Ray's, see above
@ray.remote(num_cpus=0, max_calls=1, max_retries=1)
def _look(checkpoint: RunRef, recipe: EvaluateRecipe, root: str, reading: Reading) -> EvaluationRef:
    os.nice(19)
    torch.set_num_threads(1)
    return look(checkpoint, recipe, Path(root), reading=reading)
