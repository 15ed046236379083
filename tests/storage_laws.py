"""What any storage promises, whatever it lies on: each law takes a fresh, empty storage and a folder for local files."""

import os
import pickle
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import strategies as st

from diffusion.store.storage import Found, Storage, StorageRefused

ODD_NAMES = (
    "a b/c+d.tar",
    "100%/x%2Fy",
    "ü/Ω/日本.png",
    "a&b=c?d#e",
    "~!@$*()_-';:,<>|[]{}",
    "x" * 200,
    "a.b/c",
    "a/b.c",
)
UNSAFE = ("", "/a", "../a", "a/../b", "a//b", "./a", "a/", "a\\b", "a\nb", "a\0b", "\x7f", "\udc80", "é" * 600)


def what_is_put_is_read(storage: Storage, folder: Path) -> None:
    storage.put("a/b", b"0123456789")
    assert storage.read("a/b") == b"0123456789"
    assert storage.size("a/b") == 10
    storage.put("a/b", b"new")
    assert storage.read("a/b") == b"new"
    storage.put("empty", b"")
    assert (storage.read("empty"), storage.size("empty")) == (b"", 0)


def ranges_are_those_of_a_slice(storage: Storage, folder: Path) -> None:
    data = os.urandom(1000)
    storage.put("a", data)
    for start in (0, 1, 500, 999, 1000, 2000):
        assert storage.read("a", start) == data[start:]
        for size in (0, 1, 499, 500, 1000, 5000):
            assert storage.read("a", start, size) == data[start : start + size]


def a_file_is_put_and_fetched(storage: Storage, folder: Path) -> None:
    (folder / "source").write_bytes(data := os.urandom(300_000))
    storage.put("deep/er/a", folder / "source")
    (folder / "source").unlink()
    (folder / "target").write_bytes(b"old")
    storage.fetch("deep/er/a", folder / "target")
    assert (folder / "target").read_bytes() == data == storage.read("deep/er/a")
    storage.put("empty", b"")
    storage.fetch("empty", folder / "nothing")
    assert sorted(os.listdir(folder)) == ["nothing", "target"]
    with pytest.raises(FileNotFoundError):
        storage.put("b", folder / "source")
    assert storage.size("b") is None


def what_is_not_there_is_missing(storage: Storage, folder: Path) -> None:
    storage.put("a/b/c", b"1")
    for name in ("b", "a", "a/b", "a/b/c/d", "a/b/cc"):
        assert storage.size(name) is None
        for size in (None, 0, 1):
            with pytest.raises(FileNotFoundError, match=rf"{name}( does not exist|')"):
                storage.read(name, 0, size)
        with pytest.raises(FileNotFoundError):
            storage.fetch(name, folder / "target")
        storage.remove(name)
    assert os.listdir(folder) == []
    storage.remove("a/b/c")
    assert storage.size("a/b/c") is None


def walking_is_sorted_and_by_prefix(storage: Storage, folder: Path) -> None:
    names = ["a-b", "a.b", "a/b-c", "a/b.d", "a/b/c", "ab/c", "b/a/a/a", "é/z", "日/本"]
    for number, name in enumerate(reversed(names)):
        storage.put(name, b"x" * number)
    found = list(storage.walk())
    assert [entry.name for entry in found] == sorted(names)
    assert {entry.name: entry.size for entry in found} == {n: i for i, n in enumerate(reversed(names))}
    for prefix in ("a", "a/", "a/b", "a/b/", "b/a/a", "é", "nothing", "a/nothing/", "a/b/c/d"):
        assert [entry.name for entry in storage.walk(prefix)] == sorted(n for n in names if n.startswith(prefix))


def a_mark_changes_with_the_content(storage: Storage, folder: Path) -> None:
    storage.put("a", b"1")
    storage.put("b", b"1")
    before = {entry.name: entry for entry in storage.walk()}
    assert before == {entry.name: entry for entry in storage.walk()}
    storage.put("a", b"2")
    after = {entry.name: entry for entry in storage.walk()}
    assert after["a"].mark != before["a"].mark
    assert after["b"] == before["b"] == Found("b", 1, before["b"].mark)


def odd_names_work(storage: Storage, folder: Path) -> None:
    for name in ODD_NAMES:
        storage.put(name, name.encode())
    assert [entry.name for entry in storage.walk()] == sorted(ODD_NAMES)
    for name in ODD_NAMES:
        assert storage.read(name) == name.encode()
        assert storage.size(name) == len(name.encode())
        assert [entry.name for entry in storage.walk(name)] == [name]
        storage.remove(name)
    assert list(storage.walk()) == []


def names_that_could_lead_elsewhere_are_refused(storage: Storage, folder: Path) -> None:
    for name in UNSAFE:
        for call in (storage.read, storage.size, storage.remove):
            with pytest.raises(StorageRefused, match="name"):
                call(name)
        with pytest.raises(StorageRefused, match="name"):
            storage.put(name, b"")
        with pytest.raises(StorageRefused, match="name"):
            storage.fetch(name, folder / "target")
    with pytest.raises(StorageRefused, match="name"):
        list(storage.walk("../a"))
    assert os.listdir(folder) == []
    assert list(storage.walk()) == []


def a_copy_is_the_same_storage_and_threads_share_one(storage: Storage, folder: Path) -> None:
    other = pickle.loads(pickle.dumps(storage))
    results = {}

    def work(number: int) -> None:
        (storage if number % 2 else other).put(f"{number}", bytes([number]) * 1000)
        results[number] = [storage.read(f"{number}", start, 100) for start in range(0, 1000, 100)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {number: [bytes([number]) * 100] * 10 for number in range(8)}
    assert [entry.name for entry in other.walk()] == [f"{number}" for number in range(8)]


LAWS = (
    what_is_put_is_read,
    ranges_are_those_of_a_slice,
    a_file_is_put_and_fetched,
    what_is_not_there_is_missing,
    walking_is_sorted_and_by_prefix,
    a_mark_changes_with_the_content,
    odd_names_work,
    names_that_could_lead_elsewhere_are_refused,
    a_copy_is_the_same_storage_and_threads_share_one,
)

_NAME = st.lists(
    st.text("ab .%+é", min_size=1, max_size=3).filter(lambda part: set(part) != {"."}), min_size=1, max_size=2
)
OPERATIONS = st.lists(
    st.tuples(st.sampled_from(("put", "read", "remove", "walk")), _NAME.map("/".join), st.binary(max_size=20)),
    max_size=12,
)


def behaves_as_a_dict(storage: Storage, operations: Sequence[tuple[str, str, bytes]]) -> None:
    """Put, read, remove and walk as on a dict from names to bytes.  A name and a folder of the same name exclude each
    other on a file system, so such puts are left out.
    """
    model: dict[str, bytes] = {}
    for operation, name, data in operations:
        if operation == "put":
            if not any(other.startswith(f"{name}/") or name.startswith(f"{other}/") for other in model):
                storage.put(name, data)
                model[name] = data
        elif operation == "read":
            assert storage.size(name) == (len(model[name]) if name in model else None)
            if name in model:
                assert storage.read(name, 1, 5) == model[name][1:6]
        elif operation == "remove":
            storage.remove(name)
            model.pop(name, None)
        else:
            walked = [(found.name, found.size) for found in storage.walk(name)]
            assert walked == sorted((n, len(d)) for n, d in model.items() if n.startswith(name))
