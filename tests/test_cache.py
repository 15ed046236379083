"""The shard cache: verified or absent, within its bound, fetched once by however many ask at once."""

import errno
import hashlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion.store.cache import ShardCache
from diffusion.store.publish import PREFIX
from diffusion.store.storage import LocalFolder, StorageUnavailable

ROOT = Path(__file__).parent.parent


class Counted(LocalFolder):
    """A folder that notes every fetch in a file, so that other processes' are counted too."""

    def fetch(self, name: str, target: Path) -> None:
        with open(f"{self.folder}.fetches", "a") as log:
            log.write(f"{name}\n")
        super().fetch(name, target)

    def fetched(self) -> list[str]:
        log = Path(f"{self.folder}.fetches")
        return log.read_text().split() if log.exists() else []


@pytest.fixture
def storage(tmp_path: Path) -> Counted:
    return Counted(tmp_path / "store")


def stored(storage: LocalFolder, name: str, data: bytes) -> tuple[LocalFolder, str, str, int]:
    """What `path` is asked with, of an object that is put now."""
    storage.put(name, data)
    return storage, name, hashlib.sha256(data).hexdigest(), len(data)


def listing(folder: Path) -> set[str]:
    return set(os.listdir(folder))


def test_a_shard_is_fetched_once_and_is_the_stored_bytes(storage, tmp_path):
    asked = stored(storage, "shards/a.tar", data := os.urandom(100_000))
    cache = ShardCache(tmp_path / "cache", 200_000)
    assert cache.path(*asked).read_bytes() == data
    assert ShardCache(tmp_path / "cache", 200_000).path(*asked).read_bytes() == data
    assert storage.fetched() == ["shards/a.tar"]
    assert listing(tmp_path / "cache") == {asked[2]}  # no lock, no part


def test_equal_shards_under_two_names_are_one_entry(storage, tmp_path):
    cache = ShardCache(tmp_path / "cache", 1000)
    assert cache.path(*stored(storage, "a", b"1")) == cache.path(*stored(storage, "b", b"1"))
    assert storage.fetched() == ["a"]


def test_the_least_recently_used_makes_room(storage, tmp_path):
    cache = ShardCache(tmp_path / "cache", 300)
    a, b, c, d = (stored(storage, name, name.encode() * 100) for name in "abcd")
    for number, asked in enumerate((a, b, c)):
        os.utime(cache.path(*asked), ns=(number, number))
    with open(cache.path(*b), "rb") as used:
        os.utime(cache.path(*b), ns=(1, 1))
        cache.path(*a)  # from now on b is the oldest
        cache.path(*d)
        assert used.read() == b"b" * 100  # an open file keeps its bytes
    assert listing(tmp_path / "cache") == {a[2], c[2], d[2]}
    assert storage.fetched() == ["a", "b", "c", "d"]
    cache.path(*b)
    assert listing(tmp_path / "cache") == {a[2], d[2], b[2]}
    assert storage.fetched() == ["a", "b", "c", "d", "b"]


@settings(max_examples=40, deadline=None)
@given(st.integers(50, 200), st.lists(st.integers(0, 9), max_size=25))
def test_entries_never_exceed_the_bound_and_the_order_is_that_of_use(bound, requests):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)  # most of the time, and no part of this law
        storage, cache = Counted(Path(folder, "store")), ShardCache(Path(folder, "cache"), bound)
        shards = [stored(storage, f"{i}", bytes([i]) * (5 * i + 1)) for i in range(10)]
        model: list[int] = []  # the latest used last
        for clock, i in enumerate(requests):
            if i in model:
                model.remove(i)
            while sum(5 * j + 1 for j in model) + 5 * i + 1 > bound:
                model.pop(0)
            model.append(i)
            path = cache.path(*shards[i])
            os.utime(path, ns=(clock, clock))  # clocks of file systems may be coarse
            assert path.read_bytes() == bytes([i]) * (5 * i + 1)
            assert listing(cache.folder) == {shards[j][2] for j in model}


def test_a_bound_below_a_shard_is_refused(storage, tmp_path):
    with pytest.raises(ValueError, match=r"a.tar has 11 bytes and the cache .* is bound to 10: raise the bound"):
        ShardCache(tmp_path / "cache", 10).path(*stored(storage, "a.tar", b"x" * 11))


def test_a_damaged_shard_is_fetched_again_and_then_named_with_both_digests(storage, tmp_path):
    asked = stored(storage, "a.tar", b"right")
    storage.put("a.tar", b"wrong")
    cache = ShardCache(tmp_path / "cache", 100)
    wrong = hashlib.sha256(b"wrong").hexdigest()
    with pytest.raises(ValueError, match=rf"/a.tar has sha256 {wrong}, fetched twice; the manifest says {asked[2]}"):
        cache.path(*asked)
    assert storage.fetched() == ["a.tar", "a.tar"]
    assert listing(tmp_path / "cache") == set()
    storage.put("a.tar", b"right")
    assert cache.path(*asked).read_bytes() == b"right"


def test_bytes_damaged_on_the_way_are_fetched_again(storage, tmp_path):
    class Flipping(Counted):
        def fetch(self, name: str, target: Path) -> None:
            super().fetch(name, target)
            if len(self.fetched()) == 1:
                target.write_bytes(b"wrong")

    storage = Flipping(storage.folder)
    assert ShardCache(tmp_path / "cache", 100).path(*stored(storage, "a.tar", b"right")).read_bytes() == b"right"
    assert storage.fetched() == ["a.tar", "a.tar"]


def test_an_entry_cut_short_or_dropped_is_fetched_again(storage, tmp_path):
    asked, cache = stored(storage, "a.tar", b"right"), ShardCache(tmp_path / "cache", 100)
    cache.path(*asked).write_bytes(b"rig")
    assert cache.path(*asked).read_bytes() == b"right"
    cache.path(*asked).write_bytes(b"wrong")
    cache.drop(asked[2])
    cache.drop(asked[2])
    assert cache.path(*asked).read_bytes() == b"right"
    assert len(storage.fetched()) == 3


def test_missing_shards_and_storages_that_fail_leave_nothing_behind(storage, tmp_path):
    class Down(Counted):
        def fetch(self, name: str, target: Path) -> None:
            raise StorageUnavailable("down")

    cache = ShardCache(tmp_path / "cache", 100)
    with pytest.raises(FileNotFoundError, match=r"/a\.tar"):
        cache.path(storage, "a.tar", "0" * 64, 10)
    with pytest.raises(StorageUnavailable, match="down"):
        cache.path(Down(storage.folder), "a.tar", "0" * 64, 10)
    assert listing(tmp_path / "cache") == set()


_ON_A_FULL_DISK = """
import hashlib, os, sys
from pathlib import Path
from diffusion.store.cache import ShardCache
from diffusion.store.storage import LocalFolder
storage, data = LocalFolder(Path("store")), os.urandom(2**21)
storage.put("a.tar", data)
try:
    ShardCache("small/cache", 2**30).path(storage, "a.tar", hashlib.sha256(data).hexdigest(), len(data))
except OSError as error:
    print(error.errno, error)
print(os.listdir("small/cache"))
"""


def test_a_full_disk_is_named_with_what_to_do_and_nothing_is_left(tmp_path):
    (tmp_path / "small").mkdir()
    mount = 'mount -t tmpfs -o size=1m none small && exec "$0" -c "$1"'
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, sys.executable, _ON_A_FULL_DISK],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    if "unshare" in done.stderr or "mount" in done.stderr:
        pytest.skip(f"no small file system can be had here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    error, left = done.stdout.splitlines()
    assert error.startswith(f"{errno.ENOSPC} ")
    assert re.search(
        r"no room for the 2,097,152 bytes of a.tar in small/cache, [\d,]+ bytes are left on its disk: free some, or give the"
        r" cache a bound below",
        error,
    )
    assert left == "[]"


def test_threads_that_ask_at_once_fetch_once(storage, tmp_path):
    asked = stored(storage, "a.tar", os.urandom(10_000))
    cache, paths = ShardCache(tmp_path / "cache", 20_000), []
    threads = [threading.Thread(target=lambda: paths.append(cache.path(*asked))) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert paths == [tmp_path / "cache" / asked[2]] * 16
    assert storage.fetched() == ["a.tar"]


def test_fills_under_way_count_and_wait_for_each_other(storage, tmp_path):
    """Eight threads through a cache with room for two shards: never more than that on the disk."""
    most = []

    def on_disk() -> int:  # all but the locks, whose size is a note
        sizes = []
        for path in (tmp_path / "cache").iterdir():
            with suppress(FileNotFoundError):
                sizes.append(0 if path.suffix == ".lock" else path.stat().st_size)
        return sum(sizes)

    class Watched(Counted):
        def fetch(self, name: str, target: Path) -> None:
            super().fetch(name, target)
            most.append(on_disk())
            time.sleep(0.01)  # gives others the time to make it more

    storage = Watched(storage.folder)
    shards = [stored(storage, f"{i}", bytes([i]) * 1000) for i in range(8)]
    cache, got = ShardCache(tmp_path / "cache", 2000), []

    def work(i: int) -> None:
        for j in range(8):
            cache.path(*shards[(i + j) % 8])
        got.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 8
    assert max(most) == 2000
    assert len(listing(tmp_path / "cache")) == 2


_FILL = """
import sys, time
from pathlib import Path
from diffusion.store.cache import ShardCache
from diffusion.store.storage import LocalFolder

class Slow(LocalFolder):
    def fetch(self, name, target):
        with open(f"{self.folder}.fetches", "a") as log:
            log.write(f"{name}\\n")
        super().fetch(name, target)
        print("fetched", flush=True)
        time.sleep(float(sys.argv[4]))

cache = ShardCache(sys.argv[1] + "/cache", 10**6)
print(cache.path(Slow(Path(sys.argv[1], "store")), "a.tar", sys.argv[2], int(sys.argv[3])), flush=True)
"""


def filler(folder: Path, asked: tuple, slow_s: float) -> subprocess.Popen:
    arguments = [str(folder), asked[2], str(asked[3]), str(slow_s)]
    return subprocess.Popen(
        [sys.executable, "-c", _FILL, *arguments], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_processes_that_ask_at_once_fetch_once(storage, tmp_path):
    asked = stored(storage, "a.tar", os.urandom(100_000))
    processes = [filler(tmp_path, asked, 0.5) for _ in range(4)]
    outputs = [process.communicate(timeout=60)[0].split() for process in processes]
    assert [output[-1] for output in outputs] == [str(tmp_path / "cache" / asked[2])] * 4
    assert storage.fetched() == ["a.tar"]
    assert listing(tmp_path / "cache") == {asked[2]}


def test_a_killed_fill_is_taken_over_and_swept(storage, tmp_path):
    asked = stored(storage, "a.tar", data := os.urandom(100_000))
    process = filler(tmp_path, asked, 60)
    assert process.stdout.readline() == "fetched\n"
    left = listing(tmp_path / "cache")
    assert all(name.startswith(PREFIX) for name in left)  # nothing is visible
    assert len(left) == 2  # the part, and the lock with the room it was granted
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert listing(tmp_path / "cache") == left
    for name in left:
        os.utime(tmp_path / "cache" / name, (2**32, 2**32))  # too young to be swept
    # the dead one's room is free again: its lock is not held
    cache = ShardCache(tmp_path / "cache", 100_000)
    cache.path(*stored(storage, "other.tar", bytes(60_000)))
    assert cache.path(*asked).read_bytes() == data
    assert listing(tmp_path / "cache") == {asked[2]}
    # what nobody asks for again is swept in time
    for name in left:
        (tmp_path / "cache" / name).write_bytes(b"half")
        os.utime(tmp_path / "cache" / name, (0, 0))
    cache.path(*(other := stored(storage, "b.tar", b"1")))
    assert listing(tmp_path / "cache") == {other[2]}
