"""Where bytes lie: a folder or an S3 prefix, behind the same few functions.

Names are relative, with '/'.  An object appears whole or not at all.  What is named by its content may be put twice without
harm; nothing else is put twice, but a claim (`store.lease`), which its owner alone writes.
"""

import errno
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, Protocol

from diffusion.store.publish import PREFIX, fsync_path, replacing, room_in, write_atomic
from diffusion.store.scrub import without_passwords

S3_SCHEME = "s3://"
_LONGEST_NAME = 1024  # bytes of UTF-8; S3's limit for a key


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
    """A folder's path, or s3://bucket/prefix.  Asks nobody: whether it exists shows on first use.  Raises StorageRefused."""
    text = str(uri)
    if text.startswith(S3_SCHEME):
        from diffusion.store.s3 import S3Prefix

        return S3Prefix(text)
    if scheme := re.match(
        r"([A-Za-z][A-Za-z0-9+.-]+):/", text
    ):  # of one slash: a Path made of a URI has lost the other
        raise StorageRefused(
            f"{without_passwords(text)}: {scheme[1]!r} is no kind of storage here: give a folder or s3://bucket/prefix"
        )
    return LocalFolder(Path(uri).expanduser().absolute())


def open_plain(path: str | Path, flags: int, within: int | None = None) -> int:
    """Descriptor of a plain file, as an opener for `open`.  A pipe in its place would keep the reader waiting for ever.

    within: descriptor of the folder that the path begins in.  Raises FileNotFoundError for a pipe or a device.
    """
    descriptor = os.open(path, flags | os.O_NONBLOCK, dir_fd=within)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise FileNotFoundError(errno.ENOENT, "it is no plain file", str(path))


def check_name(name: str) -> str:
    """`name`, where it is relative, stays inside and is the only way to write it.  Raises StorageRefused."""
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        raise StorageRefused(f"name {name!r} is not UTF-8: rename it") from None
    if set(name.split("/")) & {"", ".", ".."} or "\\" in name or any(ord(c) < 32 or ord(c) == 127 for c in name):
        raise StorageRefused(
            f"name {name!r}: names are relative, with '/', stay inside, and have no backslash or control character"
        )
    if size > _LONGEST_NAME:
        raise StorageRefused(f"name {name[:80]!r}... has {size:,} bytes, {_LONGEST_NAME:,} are allowed")
    return name


def check_prefix(prefix: str) -> str:
    """`prefix`, where a name may begin so.  Raises StorageRefused."""
    if prefix:
        check_name(prefix + "x")
    return prefix


class LocalFolder:
    """A folder of a local (or mounted) file system.  It is made on the first `put`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.uri = str(folder)

    def path(self, name: str) -> Path:
        """Where the object `name` is: readers of a local folder need no copy."""
        return self.folder / check_name(name)

    def read(self, name: str, start: int = 0, size: int | None = None) -> bytes:
        with self._understood(name), open(self.path(name), "rb", opener=open_plain) as file:
            file.seek(start)
            return file.read(-1 if size is None else size)

    def size(self, name: str) -> int | None:
        try:
            with self._understood(name):
                status = self.path(name).stat()
        except FileNotFoundError:
            return None
        return status.st_size if stat.S_ISREG(status.st_mode) else None

    def walk(self, prefix: str = "") -> Iterator[Found]:
        yield from self._below(check_prefix(prefix).rpartition("/")[0], prefix)

    def _below(self, folder: str, prefix: str) -> Iterator[Found]:
        try:
            with self._understood(folder), os.scandir(self.folder / folder) as listing:
                entries = [entry for entry in listing if not entry.name.startswith(PREFIX)]
        except FileNotFoundError:
            return
        # "a.b" sorts before "a/b", as the names of S3 do
        for entry in sorted(entries, key=lambda entry: entry.name + "/" * entry.is_dir()):
            name = f"{folder}/{entry.name}" if folder else entry.name
            if not (name.startswith(prefix) or prefix.startswith(f"{name}/")):
                continue
            check_name(name)
            if entry.is_dir():
                if entry.is_symlink():
                    raise StorageRefused(
                        f"{entry.path} is a link to a folder, which is not followed: put the folder there"
                    )
                yield from self._below(name, prefix)
            elif entry.is_file():
                status = entry.stat()
                yield Found(name, status.st_size, f"{status.st_size}:{status.st_mtime_ns}")

    def put(self, name: str, data: bytes | Path) -> None:
        size = len(data) if isinstance(data, bytes) else data.stat().st_size
        with self._understood(name), room_in(self.folder, f"the {size:,} bytes of {name}"):
            if isinstance(data, bytes):
                write_atomic(self.path(name), data)
            else:
                _link_or_copy(data, self.path(name))

    def fetch(self, name: str, target: Path) -> None:
        with self._understood(name):
            _copy(self.path(name), target)

    def remove(self, name: str) -> None:
        with suppress(FileNotFoundError), self._understood(name):
            self.path(name).unlink()

    @contextmanager
    def _understood(self, name: str) -> Iterator[None]:
        """Turns what a file system says in the block into what a storage says."""
        try:
            yield
        except (NotADirectoryError, IsADirectoryError) as error:  # a folder is no object, and nothing lies below one
            raise FileNotFoundError(f"{self.folder / name} does not exist") from error
        except PermissionError as error:
            raise StorageRefused(
                f"{error.filename or self.folder / name}: {error.strerror}: give this user the right to it"
            ) from error


def _link_or_copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=PREFIX, dir=target.parent) as folder:
        link = Path(folder, "link")
        try:
            os.link(source.resolve(), link)
        except FileNotFoundError:
            raise
        except OSError:  # another file system, or one without links
            _copy(source, target)
            return
        fsync_path(link)
        os.replace(link, target)
    fsync_path(target.parent)


def _copy(source: Path, target: Path) -> None:
    with open(source, "rb", opener=open_plain) as original, replacing(target) as file:
        shutil.copyfileobj(original, file, 2**20)
