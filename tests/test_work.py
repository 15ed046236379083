"""Work folders: what was interrupted is gone on with, what nobody comes back to is deleted."""

import fcntl
import os
import time

import pytest

from diffusion.data import catalogue
from diffusion.data.work import working
from diffusion.store.storage import LocalFolder

MONTH_S = 31 * 86_400


def interrupted(root: LocalFolder, name: str, days: float = 0):
    """Work of this name that was begun so many days ago."""
    with pytest.raises(ZeroDivisionError), working(root, None, name) as (folder, _):  # noqa: PT012
        (folder / "blobs").mkdir(exist_ok=True)
        (folder / "blobs" / "b").write_bytes(b"pictures")
        raise ZeroDivisionError
    then = time.time() - days * 86_400
    os.utime(folder / catalogue.LOCK, (then, then))
    return folder


def names(root: LocalFolder) -> set[str]:
    return {path.name for path in root.path("work").glob("*")}


def test_work_that_nobody_came_back_to_for_a_month_is_deleted_and_other_work_is_not(tmp_path):
    root = LocalFolder(tmp_path)
    for name, days in (("lately", 29), ("forgotten", 31), ("long", 31)):
        interrupted(root, name, days)
    (tmp_path / "work" / "of a person").mkdir()
    with catalogue.opened(tmp_path / "work" / "long"):  # somebody is at it
        os.utime(tmp_path / "work" / "long" / catalogue.LOCK, (0, 0))
        interrupted(root, "new")
    assert names(root) == {"lately", "long", "new", "of a person"}
    assert (tmp_path / "work" / "lately" / "blobs" / "b").read_bytes() == b"pictures"


def test_old_work_is_gone_on_with_by_who_comes_back_to_it(tmp_path):
    root = LocalFolder(tmp_path)
    interrupted(root, "old", 400)
    with working(root, None, "old") as (folder, _):
        assert (folder / "blobs" / "b").read_bytes() == b"pictures"
    assert not (tmp_path / "work").exists()


def test_half_written_files_of_killed_processes_are_deleted_and_those_of_living_ones_are_not(tmp_path):
    root = LocalFolder(tmp_path)
    left = [tmp_path / ".tmp-a", tmp_path / "shards" / ".tmp-b", tmp_path / "datasets" / "d" / ".tmp-c"]
    kept = [tmp_path / "shards" / "whole.tar", tmp_path / "shards" / ".tmp-written", tmp_path / "shards" / ".tmp-young"]
    for path in (*left, *kept):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"half")
        if path.name != ".tmp-young":
            os.utime(path, (0, 0))
    with open(tmp_path / "shards" / ".tmp-written") as written:
        fcntl.flock(written, fcntl.LOCK_EX)
        with working(root, None, "new"):
            pass
    assert [path for path in (*left, *kept) if path.exists()] == kept
