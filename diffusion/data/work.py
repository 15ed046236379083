"""Work folders: what an interrupted shard stage goes on from, and what becomes of those that nobody comes back to."""

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from diffusion.data import catalogue
from diffusion.store.publish import room_in, sweep
from diffusion.store.storage import LocalFolder, Storage, StorageRefused, StorageUnavailable, open_storage

_ABANDONED_S = (
    30 * 86_400.0
)  # since work was last begun or gone on with: a source that is sharded at all comes back sooner
_ELSEWHERE = "elsewhere"  # file in a work folder: the places of its blobs in roots that are no folder, one a line


@contextmanager
def working(root: Storage, work: Path | None, name: str) -> Iterator[tuple[Path, sqlite3.Connection]]:
    """The work folder of this name and its catalogue.  It is deleted when the block ends well, and kept when not; those
    of other work are deleted when they are abandoned.

    work: the folder of them; None: in a root that is a folder.  Raises catalogue.Busy and DiskFull.
    """
    if work is None:
        if not isinstance(root, LocalFolder):
            raise ValueError(f"{root.uri} is no folder: name a local folder for the work")
        work = root.path("work")
    folder = work / name
    with room_in(folder), catalogue.opened(folder) as db:
        _sweep(work)
        _sweep_files(root)
        _note_place(root, folder, db)
        yield folder, db
        _delete(folder)
    with suppress(OSError):  # other work is in it
        work.rmdir()


def blobs(root: Storage, folder: Path, db: sqlite3.Connection) -> Storage:
    """Where encoded pictures wait for their shard: any worker must be able to read them.  In a root that is no folder,
    another machine that does the same work has a place of its own."""
    if isinstance(root, LocalFolder):
        return LocalFolder(folder / "blobs")
    return open_storage(f"{root.uri}/work/{folder.name}-{catalogue.identity(db)}")


def _note_place(root: Storage, folder: Path, db: sqlite3.Connection) -> None:
    if isinstance(root, LocalFolder):
        return
    place = blobs(root, folder, db).uri
    if place not in _places(folder):
        with open(folder / _ELSEWHERE, "a") as file:
            file.write(f"{place}\n")


def _places(folder: Path) -> list[str]:
    try:
        return (folder / _ELSEWHERE).read_text().splitlines()
    except FileNotFoundError:
        return []


def _delete(folder: Path) -> None:
    """Delete a work folder, and first what it put elsewhere."""
    for place in _places(folder):
        storage = open_storage(place)
        for blob in list(storage.walk()):
            storage.remove(blob.name)
    catalogue.finish(folder)


def _sweep(work: Path) -> None:
    """Delete what is abandoned and whose storage can be reached."""
    for lock in work.glob(f"*/{catalogue.LOCK}"):
        with suppress(FileNotFoundError, catalogue.Busy, StorageRefused, StorageUnavailable):
            if time.time() - lock.stat().st_mtime > _ABANDONED_S:
                with catalogue.locked(lock.parent):
                    _delete(lock.parent)


def _sweep_files(root: Storage) -> None:
    """Delete the half-written files that killed processes left in a root that is a folder."""
    if isinstance(root, LocalFolder):
        for folder in (root.folder, *root.folder.glob("*/"), *root.folder.glob("*/*/")):
            sweep(folder)
