"""Copies of a run's checkpoints in a storage, for when its folder is lost: `<images_seen>/` with the same files.

A copy counts while its manifest is there, which is stored last and deleted first.  It is used only where all of its
files have the digests of that manifest.  Beside them lies `validated.json`, what is known of the best.
"""

import json
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TypeVar

from diffusion.recipe import TrainRecipe, canonical_json
from diffusion.store.averages import MANIFEST_NAME, Manifest
from diffusion.store.publish import publishing, room_in, sha256_file
from diffusion.store.storage import Storage
from diffusion.training import checkpoint
from diffusion.training.checkpoint import DamagedCheckpoint
from diffusion.training.journal import Journal, judged_in, measurements_in
from diffusion.training.retention import Keep, superseded
from diffusion.training.step import end_of

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


def send_missing(checkpoints: Path, storage: Storage, but: Collection[str] = ()) -> None:
    """Copy every valid checkpoint below `checkpoints` that has no copy yet, oldest first.  but: names of some that need
    none."""
    there = set(copies_in(storage))
    for folder in checkpoint.folders_in(checkpoints):
        if folder.name not in there and folder.name not in but:
            try:
                checkpoint.verify(folder)
            except DamagedCheckpoint:
                continue
            send(folder, storage)


def remove(names: Collection[str], storage: Storage) -> None:
    """Delete the copies of these checkpoints, and what an interrupted removal left of one."""
    found = sorted(found.name for found in storage.walk() if found.name.partition("/")[0] in names)
    for name in sorted(found, key=lambda name: not name.endswith(f"/{MANIFEST_NAME}")):
        storage.remove(name)


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
        remedy = ". It is replaced when the run comes by again"
        if _bring_and_tell(name, storage, checkpoints, tell, remedy):
            break


def names_gone(recipe: TrainRecipe, keep: Keep, images_seen: int, history: Path, there: Collection[str]) -> set[str]:
    """Names of the checkpoints that need not stay once that of `images_seen` is published.

    history: metrics.jsonl of the run, which tells of what was measured.  there: names of the checkpoints there are.
    """
    judged = judged_in(history).among([int(name) for name in there])
    return {checkpoint.name_of(moment) for moment in superseded(recipe, keep, images_seen, judged)}


def settle(checkpoints: Path, history: Path, storage: Storage, recipe: TrainRecipe, keep: Keep) -> None:
    """Of a finished run: copy what has no copy yet, delete what need not stay, and bring what `keep` names by its moment.

    history: metrics.jsonl of the run, which tells of what was measured.
    Raises DamagedCheckpoint where the last has neither a valid checkpoint nor an intact copy.
    """
    names = {folder.name for folder in checkpoint.folders_in(checkpoints)} | set(copies_in(storage))
    gone = names_gone(recipe, keep, end_of(recipe), history, names)
    send_missing(checkpoints, storage, but=gone)
    remove(gone, storage)
    if keep.best:
        send_measured(history, storage)
    for name in copies_in(storage):
        if int(name) in keep.moments:
            try:
                bring(name, storage, checkpoints)
            except DamagedCheckpoint as error:
                raise DamagedCheckpoint(
                    f"{error}, and the run has ended. To have that checkpoint made again, delete it and all later ones from"
                    f" {storage.uri} and {checkpoints}, and train again; to do without it, delete {storage.uri}/{name} alone"
                ) from error


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


def _bring_and_tell(
    name: str, storage: Storage, checkpoints: Path, tell: Callable[[dict[str, object]], None], remedy: str = ""
) -> bool:
    """Whether an intact copy came."""
    try:
        bring(name, storage, checkpoints)
    except DamagedCheckpoint as error:
        tell({"event": "damaged_checkpoint", "reason": f"{error}{remedy}", "instead": None})
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
        f"{storage.uri}/{name}/{file}, fetched twice: {what}. The copy of this checkpoint is damaged"
    )


def _twice(attempt: Callable[[], T]) -> T:
    """What `attempt` returns, if need be the second time: bytes may be damaged on the way."""
    try:
        return attempt()
    except DamagedCheckpoint:
        return attempt()
