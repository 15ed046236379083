"""Where bytes lie: a folder or an S3 prefix, behind the same few functions.

Names are relative, with '/'.  An object appears whole or not at all.  What is named by its content may be put twice without
harm; nothing else is put twice.
"""

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple, Protocol

from diffusion.store.publish import PREFIX, fsync_path, write_atomic

S3_SCHEME = "s3://"


class StorageRefused(ValueError):
    """The storage says no, and will say so again: credentials, a bucket that is not there, a name.  Says what to do."""


class StorageUnavailable(OSError):
    """The storage did not answer properly, however often it was asked."""


class Found(NamedTuple):
    """One object of a listing.  `mark` changes whenever the content may have."""

    name: str
    size: int
    mark: str


class Storage(Protocol):
    """A folder or an S3 prefix.  Any function may raise StorageRefused and StorageUnavailable."""

    uri: str

    def read(self, name: str, start: int = 0, size: int | None = None) -> bytes:
        """`size` bytes from `start`, or all that follow; fewer only at the object's end.  Raises FileNotFoundError."""
        ...

    def size(self, name: str) -> int | None:
        """Bytes of the object; None where there is none."""
        ...

    def walk(self, prefix: str = "") -> Iterator[Found]:
        """Every object whose name begins with `prefix`, sorted by name; what is being written is not among them."""
        ...

    def put(self, name: str, data: bytes | Path) -> None:
        """Store bytes, or a file's bytes, under `name`: whole or not at all, in place of what is there.  The file is not
        changed afterwards: a folder may hold it itself instead of a copy."""
        ...

    def fetch(self, name: str, target: Path) -> None:
        """Copy the object to the file `target`, which appears whole or not at all.  Raises FileNotFoundError."""
        ...

    def remove(self, name: str) -> None:
        """Delete the object, if it is there."""
        ...


def open_storage(uri: str | Path) -> Storage:
    """A folder's path, or s3://bucket/prefix.  Asks nobody: whether it exists shows on first use."""
    if str(uri).startswith(S3_SCHEME):
        raise StorageRefused(f"{uri}: S3 is not supported yet")
    return LocalFolder(Path(uri).expanduser().absolute())


def check_name(name: str) -> str:
    """`name`, where it is relative and stays inside.  Raises StorageRefused."""
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
        raise StorageRefused(f"name {name!r}: names are relative, with '/', and stay inside the storage")
    return name


class LocalFolder:
    """A folder of a local (or mounted) file system.  It is made on the first `put`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.uri = str(folder)

    def path(self, name: str) -> Path:
        """Where the object `name` is: readers of a local folder need no copy."""
        return self.folder / check_name(name)

    def read(self, name: str, start: int = 0, size: int | None = None) -> bytes:
        with open(self.path(name), "rb") as file:
            file.seek(start)
            return file.read(-1 if size is None else size)

    def size(self, name: str) -> int | None:
        try:
            status = self.path(name).stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return status.st_size if stat.S_ISREG(status.st_mode) else None

    def walk(self, prefix: str = "") -> Iterator[Found]:
        base = prefix.rpartition("/")[0]
        yield from (found for found in self._below(base) if found.name.startswith(prefix))

    def _below(self, folder: str) -> Iterator[Found]:
        try:
            entries = list(os.scandir(self.folder / folder))
        except (FileNotFoundError, NotADirectoryError):
            return
        # "a.b" sorts before "a/b", as the names of S3 do
        for entry in sorted(entries, key=lambda entry: entry.name + "/" * entry.is_dir()):
            name = f"{folder}/{entry.name}" if folder else entry.name
            if entry.name.startswith(PREFIX):
                continue
            if entry.is_dir():
                yield from self._below(name)
            elif entry.is_file():
                status = entry.stat()
                yield Found(name, status.st_size, f"{status.st_size}:{status.st_mtime_ns}")

    def put(self, name: str, data: bytes | Path) -> None:
        target = self.path(name)
        if isinstance(data, bytes):
            write_atomic(target, data)
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=PREFIX, dir=target.parent) as folder:
            link = Path(folder, "link")
            try:
                os.link(data, link)
            except OSError:  # another file system, or one without links
                _copy(data, target)
                return
            fsync_path(link)
            os.replace(link, target)
        fsync_path(target.parent)

    def fetch(self, name: str, target: Path) -> None:
        _copy(self.path(name), target)

    def remove(self, name: str) -> None:
        self.path(name).unlink(missing_ok=True)


def _copy(source: Path, target: Path) -> None:
    descriptor, temporary = tempfile.mkstemp(prefix=PREFIX, dir=target.parent)
    try:
        with os.fdopen(descriptor, "wb") as file, open(source, "rb") as original:
            shutil.copyfileobj(original, file, 2**20)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    fsync_path(target.parent)
