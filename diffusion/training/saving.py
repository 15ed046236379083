"""Checkpoints beside the training: the step waits while its state is copied, a thread does the rest."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch

from diffusion.training import checkpoint
from diffusion.training.checkpoint import Facts
from diffusion.training.snapshot import Snapshot, copied, snapshot_of
from diffusion.training.step import TrainState, device_of

Publish = Callable[[Snapshot, Path, Facts], str]
T = TypeVar("T")


class Saving:
    """Publishes checkpoints below a folder, with the bytes and the digests of `checkpoint.save`, one at a time.

    after: called in the thread with the folder and the digest of each that is published; the next one waits for it.
    lost: called at the end of a block in which training failed, with images_seen and the error of a checkpoint that failed
    as well: that one is not raised.
    publish: `checkpoint.publish` if None.  Of a divided state every process has a Saving, whose threads publish together.
    The copy takes as much memory of the host as the state has, from the first checkpoint to the end of the block.
    """

    def __init__(
        self,
        checkpoints: Path,
        facts: Facts,
        after: Callable[[Path, str], None] | None = None,
        lost: Callable[[int, BaseException], None] | None = None,
        publish: Publish | None = None,
    ) -> None:
        self.checkpoints, self.facts, self.after, self.lost = checkpoints, facts, after, lost
        self._publish = publish or checkpoint.publish
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._under_way: Future[None] | None = None
        self._copy: Snapshot | None = None

    def __enter__(self) -> "Saving":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        """What is under way is finished, also where training failed: it is a moment to resume from."""
        self._writer.shutdown()
        if kind is None:
            self.check()
        elif self.lost and self._under_way and (failure := self._under_way.exception()) not in (None, error):
            self.lost(self._copy.images_seen, failure)

    def begin(self, state: TrainState) -> None:
        """Have this moment published.  Waits for the checkpoint before, and raises what that one failed with."""
        self.wait()
        self._copy = copied(snapshot_of(state), self._copy)
        device = device_of(state)
        copying = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
        self._under_way = self._writer.submit(self._finish, self._copy, copying)

    def wait(self) -> None:
        """Return when nothing is under way.  Raises what the last one failed with."""
        if self._under_way:
            self._under_way.result()

    def check(self) -> None:
        """Raise what the last one failed with, if it has, without waiting for it."""
        if self._under_way and self._under_way.done():
            self._under_way.result()

    def beside(self, items: Iterator[T]) -> Iterator[T]:
        """The same items, until a checkpoint fails: then what it failed with is raised in place of the next."""
        for item in items:
            self.check()
            yield item

    def _finish(self, snapshot: Snapshot, copying: torch.cuda.Event | None) -> None:
        if copying:
            copying.synchronize()
        folder = checkpoint.folder_of(self.checkpoints, snapshot.images_seen)
        digest = self._publish(snapshot, folder, self.facts)
        if self.after:
            self.after(folder, digest)
