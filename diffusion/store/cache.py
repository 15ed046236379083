"""Local copies of shards: verified, within a bound, shared by all threads and processes of a machine.

An entry is a file named by its sha256.  It appears whole and verified or not at all, whoever dies meanwhile; what was
used longest ago makes room.  Who fills an entry holds a lock on `.tmp-SHA256.lock`, whose size says how much room the
fill has been granted, so the bound holds for fills under way too, and two processes never fetch the same shard at once.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from diffusion.store.publish import PREFIX, fsync_path, room_in, sha256_file, sweep
from diffusion.store.storage import Storage

_LOCK = ".lock"


class ShardCache:
    """A folder with local copies of at most `max_bytes` in all."""

    def __init__(self, folder: str | Path, max_bytes: int) -> None:
        self.folder, self.max_bytes = Path(folder), max_bytes

    def path(self, storage: Storage, name: str, sha256: str, size: int) -> Path:
        """A local file with the `size` bytes of `name`, whose sha256 (64 hex digits) was compared when it was fetched.

        Open it at once and keep it open while in use: another shard may take its room later, which deletes the name but
        not the bytes of an open file.  Where it is gone already when opened, ask again.  Raises ValueError (another
        content, or larger than the bound), FileNotFoundError (no such shard), DiskFull.
        """
        entry = self.folder / sha256
        if size > self.max_bytes:
            raise ValueError(
                f"{name} has {size:,} bytes and the cache {self.folder} is bound to {self.max_bytes:,}: raise the bound to"
                " several times the size of a shard"
            )
        if _use(entry, size):
            return entry
        remedy = f"free some, or give the cache a bound below {self.max_bytes:,} bytes or another folder"
        with room_in(self.folder, f"the {size:,} bytes of {name}", remedy):
            self.folder.mkdir(parents=True, exist_ok=True)
            with _locked(self.folder / f"{PREFIX}{sha256}{_LOCK}") as lock:
                if not _use(entry, size):  # nobody filled it while we waited
                    entry.unlink(missing_ok=True)
                    self._make_room(size, lock)
                    self._fill(storage, name, entry)
        return entry

    def drop(self, sha256: str) -> None:
        """Delete an entry, whose bytes turned out to be damaged: the next `path` fetches it again."""
        (self.folder / sha256).unlink(missing_ok=True)

    def _fill(self, storage: Storage, name: str, entry: Path) -> None:
        partial = self.folder / f"{PREFIX}{entry.name}"
        try:
            for _ in range(2):  # a second time, since bytes may have been damaged on the way
                storage.fetch(name, partial)
                found = sha256_file(partial)
                if found == entry.name:
                    os.replace(partial, entry)
                    fsync_path(self.folder)
                    return
        finally:
            partial.unlink(missing_ok=True)
        raise ValueError(
            f"{storage.uri}/{name} has sha256 {found}, fetched twice; the manifest says {entry.name}. A published shard"
            " never changes, so the stored one is damaged: restore it from a copy, or remove it and run `diffusion shard`"
        )

    def _make_room(self, size: int, lock: int) -> None:
        """Delete what was used longest ago until `size` bytes more are within the bound, and reserve them on `lock`."""
        while True:
            with _locked(self.folder / f"{PREFIX}room{_LOCK}"):
                sweep(self.folder)  # what killed processes left
                entries, granted = self._taken()
                room = self.max_bytes - size - sum(granted.values())
                if room >= 0:
                    room -= sum(held for _, _, held in entries)
                    for _, path, held in sorted(entries):
                        if room >= 0:
                            break
                        path.unlink(missing_ok=True)
                        room += held
                    os.ftruncate(lock, size)
                    return
            # other fills have the room: who was granted some never waits, so one of them ends
            _wait_for(max(granted, key=granted.get))

    def _taken(self) -> tuple[list[tuple[int, Path, int]], dict[Path, int]]:
        """(last use, entry, bytes) of every entry, and lock -> bytes granted of every fill under way.

        Room is granted by one at a time, but fills end at any time: then we look again, or one could be seen as neither.
        """
        while True:
            entries, granted, ended = [], {}, False
            for path in list(self.folder.iterdir()):
                try:
                    status = path.stat()
                except FileNotFoundError:
                    ended |= path.suffix == _LOCK
                    continue
                if not path.name.startswith(PREFIX):
                    entries.append((status.st_mtime_ns, path, status.st_size))
                elif path.suffix == _LOCK and status.st_size:
                    granted[path] = status.st_size
                    ended |= not _is_held(path)
            if not ended:
                filled = {f"{PREFIX}{path.name}{_LOCK}" for _, path, _ in entries}
                return entries, {path: size for path, size in granted.items() if path.name not in filled}


def _use(entry: Path, size: int) -> bool:
    """Whether the entry is there, whole; it is then the last used."""
    try:
        if entry.stat().st_size == size:
            os.utime(entry)
            return True
    except FileNotFoundError:
        pass
    return False


@contextmanager
def _locked(path: Path) -> Iterator[int]:
    """Holds the lock file `path`, made for the block: its descriptor.  Waits for whoever holds it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if _same(descriptor, path):  # or else its holder deleted it while we waited
                os.ftruncate(descriptor, 0)
                try:
                    yield descriptor
                finally:
                    path.unlink(missing_ok=True)
                    fcntl.flock(descriptor, fcntl.LOCK_UN)  # a fork may hold a copy of the descriptor
                return
        finally:
            os.close(descriptor)


def _same(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _is_held(path: Path) -> bool:
    """Whether the owner of a lock file lives.  The file of a dead one is deleted."""
    with suppress(FileNotFoundError), open(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        if _same(file.fileno(), path):
            path.unlink()
    return False


def _wait_for(path: Path) -> None:
    with suppress(FileNotFoundError), open(path) as file:
        fcntl.flock(file, fcntl.LOCK_SH)
