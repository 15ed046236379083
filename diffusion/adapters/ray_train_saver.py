"""Checkpoints of a Ray Train worker: rank 0 publishes them beside the training, and every rank reports each to Ray Train.

Of weights that are divided over the workers every rank writes its own rows.
"""

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import ray.train

from diffusion.data.stream import Batch
from diffusion.store.publish import withdraw
from diffusion.store.storage import StorageRefused, open_storage
from diffusion.training import checkpoint
from diffusion.training.copies import names_gone, remove, send, send_measured, send_missing
from diffusion.training.parallel import world_gather
from diffusion.training.retention import Keep
from diffusion.training.saving import Saving
from diffusion.training.step import TrainState


class Saver:
    """The hook of `training.loop.train`, for the length of a block.

    Ray Train is told of a checkpoint at the next one, or at the end of the block: only then is it surely published, and
    every rank is there to tell of it, as Ray Train wants.
    """

    def __init__(
        self,
        checkpoints: Path,
        notes: Path,
        facts: checkpoint.Facts,
        tell: Callable[[dict[str, Any]], None],
        *,
        keep: Keep,
        copies: str | None,
    ) -> None:
        self.checkpoints, self.notes, self.recipe, self.tell, self.keep = checkpoints, notes, facts.recipe, tell, keep
        self._copies = open_storage(copies) if copies else None
        self._first = ray.train.get_context().get_world_rank() == 0
        self._saving = None
        told = (self._published, self._lost) if self._first else (None, None)
        if facts.sharded:
            together = partial(checkpoint.publish_together, gather=world_gather(beside=True), first=self._first)
            self._saving = Saving(checkpoints, facts, *told, publish=together)
        elif self._first:
            self._saving = Saving(checkpoints, facts, *told)
        self._unreported: int | None = None  # images_seen of a checkpoint
        self._block = ExitStack()

    def __enter__(self) -> "Saver":
        if self._saving:
            self._block.enter_context(self._saving)
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        self._block.__exit__(kind, *error)
        if kind is None:
            self._report()

    def __call__(self, state: TrainState) -> None:
        if self._saving:
            self._saving.begin(state)
        self._report()
        self._unreported = state.images_seen

    def beside(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches, until a checkpoint fails: then what it failed with is raised in place of the next."""
        return self._saving.beside(batches) if self._saving else batches

    def _published(self, folder: Path, digest: str) -> None:
        images_seen = int(folder.name)
        self.tell({"event": "checkpoint", "images_seen": images_seen, "uri": str(folder), "digest": digest})
        folders = checkpoint.folders_in(self.checkpoints)
        history = self.checkpoints.parent / "metrics.jsonl"
        gone = names_gone(self.recipe, self.keep, images_seen, history, [there.name for there in folders])
        for old in folders:
            if old.name in gone:
                withdraw(old)
        if self._copies:
            try:
                send(folder, self._copies)
                send_missing(self.checkpoints, self._copies)
                remove(gone, self._copies)
                if self.keep.best:
                    send_measured(history, self._copies)
            except (OSError, StorageRefused) as error:  # the next one makes up for it, or the driver at the end
                self.tell({"event": "checkpoint_not_copied", "images_seen": images_seen, "reason": str(error)})

    def _lost(self, images_seen: int, error: BaseException) -> None:
        reason = f"{type(error).__name__}: {error}"
        self.tell({"event": "checkpoint_failed", "images_seen": images_seen, "reason": reason})

    def _report(self) -> None:
        if self._unreported is None:
            return
        folder = checkpoint.folder_of(self.checkpoints, self._unreported)
        with tempfile.TemporaryDirectory(dir=self.notes) as pointer:
            Path(pointer, "pointer.json").write_text(json.dumps({"uri": str(folder)}))
            ray.train.report(
                {"images_seen": self._unreported},
                checkpoint=ray.train.Checkpoint.from_directory(pointer) if self._first else None,
                checkpoint_dir_name=folder.name,
            )
        self._unreported = None
