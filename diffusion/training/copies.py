"""Copies of a run's checkpoints in a storage, for when its folder is lost: `<images_seen>/` with the same files.

A copy counts while its manifest is there, which is stored last and deleted first.  It is used only where all of its
files have the digests of that manifest.  Beside them lies `validated.json`, what is known of the best.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from diffusion.recipe import canonical_json
from diffusion.store.averages import MANIFEST_NAME, Manifest
from diffusion.store.publish import publishing, room_in, sha256_file
from diffusion.store.storage import Storage
from diffusion.training import checkpoint
from diffusion.training.checkpoint import DamagedCheckpoint
from diffusion.training.journal import Journal, judged_in, measurements_in

_COPY = re.compile(rf"([0-9]+)/{re.escape(MANIFEST_NAME)}")
_MEASURED = "validated.json"

T = TypeVar("T")


def copies_in(storage: Storage) -> list[str]:
    """Names of the checkpoints of which there is a copy, oldest first."""
    return [match[1] for found in storage.walk() if (match := _COPY.fullmatch(found.name))]


def send(folder: Path, storage: Storage) -> None:
    """Copy a published checkpoint, in place of one of its name."""
    manifest = checkpoint.read_manifest(folder)
    storage.remove(f"{folder.name}/{MANIFEST_NAME}")
    for name in (*manifest.files, MANIFEST_NAME):
        storage.put(f"{folder.name}/{name}", folder / name)


def send_missing(checkpoints: Path, storage: Storage) -> None:
    """Copy every valid checkpoint below `checkpoints` that has no copy yet, oldest first."""
    there = set(copies_in(storage))
    for folder in checkpoint.folders_in(checkpoints):
        if folder.name not in there:
            try:
                checkpoint.verify(folder)
            except DamagedCheckpoint:
                continue
            send(folder, storage)


def remove(name: str, storage: Storage) -> None:
    """Delete the copy of a checkpoint, if there is one."""
    storage.remove(f"{name}/{MANIFEST_NAME}")
    for found in list(storage.walk(f"{name}/")):
        storage.remove(found.name)


def bring(name: str, storage: Storage, checkpoints: Path) -> None:
    """Publish a verified copy below `checkpoints`, where a valid one of that name is not there already.

    Raises DamagedCheckpoint naming the object of which no intact bytes come, DiskFull.
    """
    final = Path(checkpoints) / name
    checkpoint.make_way(final)
    if not final.exists():
        with room_in(final.parent, f"the checkpoint {storage.uri}/{name}"), publishing(final) as temporary:
            manifest = _twice(lambda: _fetch_manifest(name, storage, temporary))
            for file, expected in manifest.files.items():
                _twice(lambda file=file, sha256=expected.sha256: _fetch(name, file, sha256, storage, temporary))


def bring_newest(checkpoints: Path, storage: Storage, tell: Callable[[dict[str, object]], None]) -> None:
    """Bring the newest copy that is intact, where it is newer than every valid checkpoint below `checkpoints`.

    tell: hears of each copy that is damaged, and of the one that was brought.
    """
    newest, _ = checkpoint.latest(checkpoints)
    for name in reversed(copies_in(storage)):
        if newest and name <= newest.name:
            break
        if _bring_and_tell(name, storage, checkpoints, tell):
            break


def send_measured(history: Path, storage: Storage) -> None:
    """Copy what metrics.jsonl tells of checkpoints that were measured."""
    storage.put(_MEASURED, canonical_json(measurements_in(history)))


def bring_best(
    checkpoints: Path, history: Path, n: int, storage: Storage, tell: Callable[[dict[str, object]], None]
) -> None:
    """Have metrics.jsonl tell of what was measured, and the n best be there, as far as the copies have them.

    tell: hears of each that was brought, and of each whose copy is damaged.
    """
    try:
        measured = json.loads(storage.read(_MEASURED))
    except FileNotFoundError:
        measured = []
    journal, told = Journal(history), judged_in(history).told
    for record in measured:
        if record["images_seen"] not in told:
            journal.event(record)
    here = {folder.name for folder in checkpoint.folders_in(checkpoints)}
    there = set(copies_in(storage))
    best = judged_in(history).among([int(name) for name in here | there]).best(n)
    for name in sorted(there - here):
        if int(name) in best:
            _bring_and_tell(name, storage, checkpoints, tell)


def _bring_and_tell(name: str, storage: Storage, checkpoints: Path, tell: Callable[[dict[str, object]], None]) -> bool:
    """Whether an intact copy came."""
    try:
        bring(name, storage, checkpoints)
    except DamagedCheckpoint as error:
        tell({"event": "damaged_checkpoint", "reason": str(error), "instead": None})
        return False
    tell({"event": "fetched_checkpoint", "images_seen": int(name), "uri": f"{storage.uri}/{name}"})
    return True


def _fetch_manifest(name: str, storage: Storage, folder: Path) -> Manifest:
    try:
        storage.fetch(f"{name}/{MANIFEST_NAME}", folder / MANIFEST_NAME)
        return checkpoint.read_manifest(folder)
    except (FileNotFoundError, DamagedCheckpoint) as error:
        raise _damaged(name, MANIFEST_NAME, storage, "it is no manifest as it was published") from error


def _fetch(name: str, file: str, sha256: str, storage: Storage, folder: Path) -> None:
    try:
        storage.fetch(f"{name}/{file}", folder / file)
    except FileNotFoundError as error:
        raise _damaged(name, file, storage, "it is not there") from error
    actual = sha256_file(folder / file)
    if actual != sha256:
        raise _damaged(name, file, storage, f"sha256 {actual[:12]}, the manifest says {sha256[:12]}")


def _damaged(name: str, file: str, storage: Storage, what: str) -> DamagedCheckpoint:
    return DamagedCheckpoint(
        f"{storage.uri}/{name}/{file}, fetched twice: {what}. The copy of this checkpoint is damaged: it is replaced when"
        f" the run comes by again"
    )


def _twice(attempt: Callable[[], T]) -> T:
    """What `attempt` returns, if need be the second time: bytes may be damaged on the way."""
    try:
        return attempt()
    except DamagedCheckpoint:
        return attempt()
