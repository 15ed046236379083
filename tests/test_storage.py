"""A folder as a storage; and asking again."""

import math
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings

from diffusion.store import retry
from diffusion.store.publish import PREFIX
from diffusion.store.retry import Passing, Patience, ask, retries
from diffusion.store.s3 import S3Prefix
from diffusion.store.storage import LocalFolder, StorageRefused, StorageUnavailable, open_storage
from tests.storage_laws import LAWS, OPERATIONS, behaves_as_a_dict


@pytest.fixture
def storage(tmp_path: Path) -> LocalFolder:
    return LocalFolder(tmp_path / "root")


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_laws(law, storage: LocalFolder, tmp_path: Path):
    (tmp_path / "local").mkdir()
    law(storage, tmp_path / "local")


@settings(max_examples=60, deadline=None)
@given(OPERATIONS)
def test_behaves_as_a_dict(operations):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)  # most of the time, and no part of this law
        behaves_as_a_dict(LocalFolder(Path(folder)), operations)


def test_a_folder_s_walk_leaves_out_what_is_being_written_and_follows_no_link_to_a_folder(storage, tmp_path):
    storage.put("a/b", b"1")
    (storage.folder / f"{PREFIX}half").write_bytes(b"half")
    (storage.folder / "broken").symlink_to(tmp_path / "nowhere")
    (storage.folder / "linked").symlink_to(storage.path("a/b"))
    assert [found.name for found in storage.walk()] == ["a/b", "linked"]
    (storage.folder / "round").symlink_to(storage.folder)
    with pytest.raises(StorageRefused, match="round is a link to a folder"):
        list(storage.walk())


def test_a_pipe_in_the_place_of_an_object_is_no_object_and_keeps_nobody_waiting(storage, tmp_path):
    storage.put("a/b", b"1")
    storage.path("a/b").unlink()
    os.mkfifo(storage.path("a/b"))  # nobody writes into it
    assert storage.size("a/b") is None
    for call in (lambda: storage.read("a/b"), lambda: storage.fetch("a/b", tmp_path / "copy")):
        with pytest.raises(FileNotFoundError, match="it is no plain file"):
            call()


def test_a_large_file_is_linked_and_copied_where_it_cannot_be(storage, tmp_path, monkeypatch):
    source = tmp_path / "source"
    source.write_bytes(b"1")
    storage.put("a", source)
    assert storage.path("a").stat().st_ino == source.stat().st_ino
    (tmp_path / "link").symlink_to(source)
    storage.put("b", tmp_path / "link")
    assert not storage.path("b").is_symlink()

    def no_link(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", no_link)
    storage.put("c", source)
    assert storage.path("c").stat().st_ino != source.stat().st_ino
    assert storage.read("c") == b"1"
    assert sorted(os.listdir(storage.folder)) == ["a", "b", "c"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_without_permission_is_refused(storage):
    storage.put("a/b", b"1")
    storage.path("a").chmod(0)
    try:
        with pytest.raises(StorageRefused, match="give this user the right"):
            storage.read("a/b")
    finally:
        storage.path("a").chmod(0o755)


def test_a_name_that_is_not_utf8_is_refused_when_met(storage):
    storage.put("a", b"1")
    os.rename(storage.path("a"), os.fsencode(storage.folder) + b"/\xff")
    with pytest.raises(StorageRefused, match="not UTF-8: rename it"):
        list(storage.walk())


def test_what_a_uri_may_be(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert isinstance(open_storage("s3://bucket"), S3Prefix)
    assert open_storage("s3://bucket/a/b/").uri == "s3://bucket/a/b"
    assert open_storage("s3://bucket/").uri == "s3://bucket"
    assert open_storage("data").uri == open_storage(tmp_path / "data").uri == str(tmp_path / "data")
    assert open_storage("~/data").uri == str(Path.home() / "data")
    for uri in ("gs://bucket", "file:///data", "https://host/x", Path("s3://bucket/x")):
        with pytest.raises(StorageRefused, match=r"give a folder or s3://bucket/prefix"):
            open_storage(uri)
    for uri in ("s3://", "s3:///x", "s3://a b/x", "s3://b", "s3://bücket/x"):
        with pytest.raises(StorageRefused, match="write s3://bucket/prefix"):
            open_storage(uri)
    for uri in ("s3://bucket/../x", "s3://bucket/a//b", "s3://bucket/a\\b"):
        with pytest.raises(StorageRefused, match="names are relative"):
            open_storage(uri)
    for uri in ("s3://key:secret@bucket/x", "s3://key:sec/secret@bucket/x", "s3://key@bucket"):
        with pytest.raises(StorageRefused, match="holds no credentials") as refused:
            open_storage(uri)
        assert "sec" not in str(refused.value)


def failing(times: int, kind: str = "timeout"):
    asked = []

    def attempt() -> int:
        asked.append(1)
        if len(asked) <= times:
            raise Passing(kind, "no byte")
        return len(asked)

    return attempt


def test_passing_failures_are_asked_again_and_counted():
    patience, before = Patience(attempts=5, first_s=0), retries()
    assert ask("x", failing(0), patience) == 1
    assert retries() == before
    assert ask("x", failing(4), patience) == 5
    assert ask("x", failing(1, "503 SlowDown"), patience) == 2
    assert retries() - before == {"timeout": 4, "503 SlowDown": 1}
    with pytest.raises(StorageUnavailable, match=r"s3://b/x: timeout: no byte \(asked 5 times in 0.0 s\)"):
        ask("s3://b/x", failing(5), patience)
    assert (retries() - before)["timeout"] == 8  # the last failure is not asked again
    with pytest.raises(ZeroDivisionError):
        ask("x", lambda: 1 // 0, patience)
    assert (retries() - before).total() == 9


def test_a_wait_that_people_would_notice_is_told_now_and_then(caplog, monkeypatch):
    monkeypatch.setattr(retry, "_last_told", -math.inf)
    patience = Patience(attempts=9, first_s=0)
    assert ask("s3://b/x", failing(4), patience) == 5
    assert caplog.messages == []
    monkeypatch.setattr(retry, "_SILENT_S", -1)
    assert ask("s3://b/x", failing(4), patience) == 5
    assert caplog.messages == ["s3://b/x: timeout: no byte (asked 1 times in 0.0 s): asking again"]
    monkeypatch.setattr(retry, "_TOLD_EVERY_S", -1)
    assert ask("s3://b/x", failing(4), patience) == 5
    assert len(caplog.messages) == 5


def test_patience_ends_with_its_time():
    with pytest.raises(StorageUnavailable, match="asked 1 times"):
        ask("x", failing(1), Patience(attempts=9, first_s=3600, longest_s=3600, total_s=0))
    with pytest.raises(ValueError, match="attempts=0"):
        Patience(attempts=0)


@pytest.mark.parametrize(("failed", "bound"), [(1, 0.5), (2, 1.0), (4, 4.0), (5, 6.0), (2000, 6.0)])
def test_waits_are_spread_from_nothing_to_a_bound_that_doubles(failed, bound):
    patience = Patience(first_s=0.5, longest_s=6.0)
    waits = [patience.wait_s(failed) for _ in range(2000)]
    assert 0 <= min(waits) < 0.02 * bound  # each of the three fails by chance once in 1e17
    assert 0.98 * bound < max(waits) <= bound
    assert abs(sum(waits) / 2000 - bound / 2) < 0.06 * bound
