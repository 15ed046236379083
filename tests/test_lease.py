"""One owner at a time, and a dead one ends: by itself, at once on its own machine, and by no clock but one's own."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from diffusion.recipe import canonical_json
from diffusion.store.lease import FOLDER, Claim, Lease, Watch, began, claimed, leased, lives, machine
from diffusion.store.storage import LocalFolder, Storage, StorageUnavailable

ROOT = Path(__file__).parents[1]
QUICK_S = 0.6  # a lease's length where a test waits for its end
OWNER = """
import sys, time
from diffusion.store.lease import leased
from diffusion.store.storage import open_storage
with leased(open_storage(sys.argv[1]), "work", lease_s=float(sys.argv[2])) as lease:
    print("has it", flush=True)
    sys.stdin.readline()
    end = time.monotonic() + 20
    while not lease.lost and len(sys.argv) > 3 and time.monotonic() < end:
        time.sleep(0.05)
    print("lost" if lease.lost else "kept", flush=True)
"""


@pytest.fixture
def storage(tmp_path: Path) -> LocalFolder:
    return LocalFolder(tmp_path / "root")


def there(storage: Storage) -> list[str]:
    return [found.name for found in storage.walk(f"{FOLDER}/")]


@contextmanager
def owner(storage: Storage, *arguments: object):
    """A process that has the lease until it is told a line."""
    command = [sys.executable, "-c", OWNER, storage.uri, *map(str, arguments)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "has it\n"
            yield process
        finally:
            process.kill()


def elsewhere(storage: Storage, **facts: object) -> Claim:
    """The claim of somebody on another machine."""
    claim = Claim(**({"number": 1, "beat": 1, "host": "far", "machine": "another", "process": 1, "began": 5} | facts))
    storage.put(f"{FOLDER}/work.far.json", canonical_json(claim))
    return claim


def one_at_a_time(storage: Storage, threads: int, turns: int) -> None:
    """Each reads a number and puts the next: one that is lost shows two at a time."""
    storage.put("count", b"0")

    def count() -> None:
        for _ in range(turns):
            with leased(storage, "count"):
                now = int(storage.read("count"))
                storage.put("count", str(now + 1).encode())

    workers = [threading.Thread(target=count) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert storage.read("count") == str(threads * turns).encode()
    assert there(storage) == []


def test_one_has_it_at_a_time(storage):
    one_at_a_time(storage, threads=4, turns=5)


def test_other_work_is_not_waited_for(storage):
    with leased(storage, "work"), leased(storage, "work2", patience_s=0), leased(storage, "wor", patience_s=0):
        assert len(there(storage)) == 3


def test_the_lease_of_a_killed_process_ends_at_once(storage):
    with owner(storage, 60) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert len(there(storage)) == 1
        with leased(storage, "work", patience_s=0):
            assert len(there(storage)) == 1
    assert there(storage) == []


def test_a_living_process_is_waited_for_and_named_once(storage):
    waited = []

    def wait(claim: Claim) -> None:
        waited.append(claim)
        threading.Timer(0.3, lambda: process.stdin.write("\n") and process.stdin.flush()).start()

    with owner(storage, 60) as process:
        with (
            pytest.raises(TimeoutError, match=rf"process {process.pid} on .* look whether it hangs"),
            leased(storage, "work", patience_s=0),
        ):
            pass
        with leased(storage, "work", wait=wait):
            assert process.stdout.readline() == "kept\n"
    assert [claim.process for claim in waited] == [process.pid]


def test_another_process_under_the_number_of_a_dead_one_is_not_taken_for_it(storage):
    elsewhere(storage, machine=machine(), process=os.getpid(), began=1)
    with leased(storage, "work", patience_s=0):
        pass
    elsewhere(storage, machine=machine(), process=os.getpid(), began=began(os.getpid()))
    with pytest.raises(TimeoutError), leased(storage, "work", patience_s=0.2):
        pass


def test_a_child_that_has_ended_does_not_live(storage):
    child = subprocess.Popen([sys.executable, "-c", ""])
    while began(child.pid) != 0:
        time.sleep(0.01)
    assert not lives(child.pid)  # though its parent has not asked for its end, and its number is taken
    child.wait()
    assert not lives(child.pid)
    assert lives(os.getpid(), began(os.getpid()))


def test_one_elsewhere_is_gone_when_its_claim_stands_still_and_not_before(storage, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 4e9)  # whatever clocks say
    elsewhere(storage)
    before = time.monotonic()
    with leased(storage, "work", lease_s=QUICK_S):
        assert QUICK_S < time.monotonic() - before < 20 * QUICK_S
    assert there(storage) == []


def test_one_elsewhere_that_beats_is_waited_for(storage):
    beats = iter(range(1, 1000))
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(QUICK_S / 6):
            elsewhere(storage, beat=next(beats))

    beating = threading.Thread(target=beat)
    elsewhere(storage)
    beating.start()
    try:
        with (
            pytest.raises(TimeoutError, match="process 1 on far"),
            leased(storage, "work", lease_s=QUICK_S, patience_s=4 * QUICK_S),
        ):
            pass
    finally:
        ended.set()
        beating.join()


def test_who_chooses_is_waited_for(storage):
    elsewhere(storage, number=0)
    with pytest.raises(TimeoutError), leased(storage, "work", patience_s=0.2):
        pass


def test_one_that_was_halted_is_overtaken_and_learns_it(storage):
    with owner(storage, QUICK_S, "looks") as process:
        process.send_signal(signal.SIGSTOP)
        with leased(storage, "work", lease_s=QUICK_S, patience_s=20 * QUICK_S):
            process.send_signal(signal.SIGCONT)
            process.stdin.write("\n")
            process.stdin.flush()
            assert process.stdout.readline() == "lost\n"


def test_a_claim_is_kept_alive_though_the_storage_fails_now_and_then(storage, monkeypatch):
    failing = iter(range(1000))
    put = LocalFolder.put

    def flaky(self: LocalFolder, name: str, data: bytes) -> None:
        if next(failing) % 2:
            raise StorageUnavailable("away")
        put(self, name, data)

    monkeypatch.setattr(LocalFolder, "put", flaky)
    watch = Watch(storage, "work", QUICK_S)
    with claimed(storage, "work", lease_s=QUICK_S) as lease:
        seen = set()
        end = time.monotonic() + 2 * QUICK_S
        while time.monotonic() < end:
            seen |= {claim.beat for claim in watch.look().values()}
            assert watch.gone() == []
            time.sleep(QUICK_S / 20)
    assert len(seen) > 3
    assert not lease.lost


def test_what_is_no_claim_keeps_nobody_waiting_and_goes(storage):
    storage.put(f"{FOLDER}/work.broken.json", b"{")
    with leased(storage, "work", patience_s=0):
        pass
    watch = Watch(storage, "work", 0.1)
    watch.look()
    time.sleep(0.2)
    watch.look()
    assert watch.gone() == [f"{FOLDER}/work.broken.json"]


def test_a_claim_of_a_later_program_is_understood(storage):
    claim = elsewhere(storage)
    storage.put(f"{FOLDER}/work.far.json", canonical_json(claim.model_dump() | {"colour": "blue"}))
    with pytest.raises(TimeoutError), leased(storage, "work", patience_s=0):
        pass


def test_a_number_chosen_too_long_ago_is_given_up(storage):
    with claimed(storage, "work", lease_s=60) as lease:
        lease._said -= 100  # as where this process was halted
        with pytest.raises(Exception, match=lease.name) as given_up:
            lease.say(1)
        assert type(given_up.value).__name__ == "Gone"
        assert isinstance(lease, Lease)
        assert lease.lost
