"""Publishing: a folder appears whole, under its final name, once, and never changes again.

Write below a temporary sibling, flush everything to the disk, rename.  A process that dies leaves only a hidden
`.tmp-*` folder, which the next publisher beside it sweeps away.
"""

import errno
import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

PREFIX = ".tmp-"
_SWEEP_AFTER_S = 60.0  # a folder younger than this may belong to a writer that has not locked it yet


def sha256_file(path: Path) -> str:
    """sha256 of a file's bytes, 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_checked(path: Path, sha256: str, why: str) -> bytes:
    """The bytes of a file, where they are the expected ones.  `why`: what a difference means and what to do about it.

    Raises ValueError naming the file.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}). {why}") from error
    actual = hashlib.sha256(data).hexdigest()
    if actual != sha256:
        raise ValueError(f"{path}: sha256 {actual[:12]}, expected {sha256[:12]}. {why}")
    return data


_REMEDY = "free some, and the same command goes on"


class DiskFull(OSError):
    """There is no room for a file.  Says for which, where, and what to do."""

    def __str__(self) -> str:
        return self.strerror


def read_published(folder: str | Path, file: str, digest: str | None, *, what: str, command: str) -> bytes:
    """The digested file of a published folder; where `digest` is given, only that very one.  what: it is, for people;
    command: what makes one.  Raises ValueError."""
    path = Path(folder) / file
    if not path.is_file():
        raise ValueError(f"{folder} holds no {what} ({file} is missing): make one with `{command}`")
    if digest is None:
        return path.read_bytes()
    again = f"A published {what} never changes, so this one is damaged: delete its folder and run `{command}` again"
    return read_checked(path, digest, again)


def disk_full(folder: Path, what: str, remedy: str = _REMEDY) -> DiskFull:
    """The error for `what` not going into `folder`, which need not exist."""
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    left = shutil.disk_usage(there).free
    return DiskFull(errno.ENOSPC, f"no room for {what} in {folder}, {left:,} bytes are left on its disk: {remedy}")


@contextmanager
def room_in(folder: Path, what: str = "a file", remedy: str = _REMEDY) -> Iterator[None]:
    """What fails in the block for want of room in `folder` is a `disk_full`; what is one already stays as it is."""
    try:
        yield
    except DiskFull:
        raise
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise disk_full(folder, what, remedy) from error


@contextmanager
def temporary(what: str) -> Iterator[Path]:
    """A folder for the length of the block, where the system keeps temporary files.  What fails in the block for want of
    room is a `disk_full` there, unless it is one already.  what: goes into it, for people."""
    parent = Path(tempfile.gettempdir())
    with (
        room_in(parent, what, "free some, or set TMPDIR to another folder"),
        tempfile.TemporaryDirectory(prefix=PREFIX, dir=parent) as name,
    ):
        yield Path(name)


def fsync_path(path: Path) -> None:
    """Flush one file's bytes, or one folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(folder: Path) -> None:
    """Flush every file and folder below `folder`, then `folder` itself."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            fsync_path(Path(parent, name))
        fsync_path(Path(parent))


@contextmanager
def folder_locked(folder: Path) -> Iterator[None]:
    """One process at a time is in such a block of a folder, which is made if it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path, mode: int = 0o644) -> Iterator[BinaryIO]:
    """A file to write in the block, under a temporary name.  When the block ends well it is flushed to the disk and takes
    the place of `path`; on any exception it is deleted.  Until then its owner alone can read it, then who `mode` lets.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=PREFIX, dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # so that `sweep` lets it alone
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.chmod(temporary, mode)
            os.replace(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    fsync_path(path.parent)


def write_atomic(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Put a small file in place, replacing it if it exists: readers see the old bytes or the new, never a part."""
    with replacing(path, mode) as file:
        file.write(data)


@contextmanager
def staging(parent: Path) -> Iterator[Path]:
    """A fresh temporary folder below `parent`, for a folder whose final name is known only when it is written.
    `publish` renames it; one that was not published is deleted at the end of the block.
    """
    parent.mkdir(parents=True, exist_ok=True)
    sweep(parent)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
    folder.chmod(0o755)
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder
    finally:
        os.close(lock)
        shutil.rmtree(folder, ignore_errors=True)


def publish(folder: Path, final: Path) -> Path:
    """Flush `folder` to the disk and rename it to `final`, its sibling.

    Raises FileExistsError where `final` exists: nothing published is overwritten.  Content-addressed callers catch it
    and verify what is there.
    """
    fsync_tree(folder)
    final.parent.mkdir(parents=True, exist_ok=True)
    if final.exists():  # rename would silently replace an empty folder
        raise FileExistsError(_taken(final))
    try:
        folder.rename(final)
    except OSError as error:
        if final.exists():  # another publisher was faster
            raise FileExistsError(_taken(final)) from error
        raise
    fsync_path(final.parent)
    return final


@contextmanager
def publishing(final: Path) -> Iterator[Path]:
    """Write a folder in the block, under the temporary name it is given; it becomes `final` when the block ends well.

    Raises FileExistsError where `final` exists.  On any exception nothing appears.
    """
    if final.exists():
        raise FileExistsError(_taken(final))
    with staging(final.parent) as folder:
        yield folder
        publish(folder, final)


def withdraw(folder: Path) -> None:
    """Delete what was published, if it is there: its name is gone at once, and never stands for a part of it."""
    with staging(folder.parent) as aside:
        with suppress(FileNotFoundError):
            folder.rename(aside / folder.name)
        fsync_path(folder.parent)


def _taken(final: Path) -> str:
    return f"{final} is published already and is never overwritten: use it, or remove the folder to make it again"


def sweep(parent: Path) -> None:
    """Delete what dead publishers left: a living one holds a lock on its temporary folder."""
    for path in parent.glob(PREFIX + "*"):
        with _left(path) as left:
            if not left:
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def left_behind(root: Path) -> Iterator[Path]:
    """What dead publishers left anywhere below a folder, and nobody has swept."""
    for folder, names, files in os.walk(root):
        for path in (Path(folder, name) for name in (*names, *files) if name.startswith(PREFIX)):
            with _left(path) as left:
                if left:
                    yield path
        names[:] = [name for name in names if not name.startswith(PREFIX)]


@contextmanager
def _left(path: Path) -> Iterator[bool]:
    """Whether nobody writes it any more; within the block nobody begins to."""
    descriptor = None
    with suppress(FileNotFoundError, PermissionError):  # gone meanwhile, or another user's
        if time.time() - path.stat().st_mtime >= _SWEEP_AFTER_S:
            descriptor = os.open(path, os.O_RDONLY)
    if descriptor is None:
        yield False
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        yield False
    else:
        yield True
    finally:
        os.close(descriptor)
