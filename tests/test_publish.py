"""Publishing: whole or not at all, once, and nothing left behind."""

import errno
import hashlib
import multiprocessing
import os
import pickle
import re
import signal
import tempfile
import time
from pathlib import Path

import pytest

from diffusion.store.publish import (
    PREFIX,
    DiskFull,
    publish,
    publishing,
    replacing,
    room_in,
    sha256_file,
    staging,
    temporary,
    write_atomic,
)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_sha256_of_a_file(tmp_path):
    data = os.urandom(100_001)
    (tmp_path / "a").write_bytes(data)
    assert sha256_file(tmp_path / "a") == hashlib.sha256(data).hexdigest()


def test_a_folder_appears_whole_when_the_block_ends(tmp_path):
    final = tmp_path / "deep" / "final"
    with publishing(final) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a").write_text("1")
        assert not final.exists()
        assert folder.parent == final.parent  # a rename is atomic only within one file system
    assert (final / "sub" / "a").read_text() == "1"
    assert names(final.parent) == {"final"}
    assert final.stat().st_mode & 0o777 == 0o755


def test_nothing_appears_when_the_block_fails(tmp_path):
    with pytest.raises(ZeroDivisionError), publishing(tmp_path / "final") as folder:  # noqa: PT012
        (folder / "a").write_text("1")
        raise ZeroDivisionError
    assert names(tmp_path) == set()


def test_published_folders_are_never_overwritten(tmp_path):
    with publishing(tmp_path / "final") as folder:
        (folder / "a").write_text("first")
    with pytest.raises(FileExistsError, match="never overwritten"), publishing(tmp_path / "final"):
        pytest.fail("the block must not start")
    with staging(tmp_path) as folder:
        (folder / "a").write_text("second")
        with pytest.raises(FileExistsError, match="never overwritten"):
            publish(folder, tmp_path / "final")
    assert (tmp_path / "final" / "a").read_text() == "first"
    assert names(tmp_path) == {"final"}


def test_an_empty_folder_in_the_way_is_not_replaced(tmp_path):
    (tmp_path / "final").mkdir()
    with staging(tmp_path) as folder, pytest.raises(FileExistsError):
        publish(folder, tmp_path / "final")


def test_write_atomic_replaces_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "new" / "a.json"
    write_atomic(path, b"1")
    write_atomic(path, b"22")
    assert path.read_bytes() == b"22"
    assert names(path.parent) == {"a.json"}
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_file_that_is_being_written_is_not_swept(tmp_path):
    with replacing(tmp_path / "a") as file:
        file.write(b"half")
        (temporary,) = tmp_path.iterdir()
        os.utime(temporary, (0, 0))  # as if it had been at it for years
        with staging(tmp_path):
            pass
        file.write(b", whole")
    assert (tmp_path / "a").read_bytes() == b"half, whole"
    assert names(tmp_path) == {"a"}


def _stage_and_wait(parent: Path, ready) -> None:
    with staging(parent) as folder:
        (folder / "half").write_text("written")
        os.utime(folder, (0, 0))  # as if it had been at it for years
        ready.set()
        time.sleep(60)


def test_leftovers_of_a_killed_publisher_are_swept_and_a_living_one_is_left_alone(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=_stage_and_wait, args=(tmp_path, ready))
    process.start()
    try:
        assert ready.wait(30)
        with publishing(tmp_path / "one"):
            pass
        assert any(name.startswith(PREFIX) for name in names(tmp_path))  # its lock is held
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    assert any(name.startswith(PREFIX) for name in names(tmp_path))
    with publishing(tmp_path / "two"):
        pass
    assert names(tmp_path) == {"one", "two"}


def test_a_full_disk_is_told_once_with_what_is_left(tmp_path):
    with pytest.raises(DiskFull) as told, room_in(tmp_path / "new"), room_in(tmp_path / "new" / "deep", "the list"):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")
    said = str(told.value)
    assert re.fullmatch(
        rf"no room for the list in {tmp_path}/new/deep, [\d,]+ bytes are left on its disk: free some, .*", said
    )
    assert told.value.errno == errno.ENOSPC
    again = pickle.loads(pickle.dumps(told.value))  # from a worker
    assert (type(again), str(again)) == (DiskFull, said)
    elsewhere = rf"no room for a copy in {tempfile.gettempdir()}, .*: free some, or set TMPDIR to another folder"
    with pytest.raises(DiskFull, match=elsewhere), temporary("a copy") as folder:
        raise OSError(errno.ENOSPC, f"No space left on {folder}")
    assert folder.parent == Path(tempfile.gettempdir())
    assert not folder.exists()
    with pytest.raises(PermissionError), room_in(tmp_path):
        raise PermissionError(errno.EACCES, "no")
