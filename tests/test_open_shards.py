"""Shards in use are held in memory, as many as there is room for; what is held changes no byte and hides no damage."""

import os
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from diffusion.data import manifest, open_shards
from diffusion.data.manifest import ShardEntry
from diffusion.data.open_shards import OpenShards
from diffusion.data.reader import ShardReader
from diffusion.store.refs import DatasetRef
from diffusion.store.storage import LocalFolder
from tests.dataset_of import publish, sample

SHARDS = [[sample(4 * shard + i, 8) for i in range(4)] for shard in range(6)]


@pytest.fixture
def dataset(tmp_path) -> DatasetRef:
    return publish(LocalFolder(tmp_path), tmp_path, SHARDS, 8)


@pytest.fixture
def reads(monkeypatch) -> list[int]:
    """Bytes asked of the system by each read of a shard."""
    sizes: list[int] = []
    pread, preadv = os.pread, os.preadv

    def noted(descriptor: int, size: int, start: int) -> bytes:
        sizes.append(size)
        return pread(descriptor, size, start)

    def noted_into(descriptor: int, buffers: list[np.ndarray], start: int) -> int:
        sizes.extend(buffer.nbytes for buffer in buffers)
        return preadv(descriptor, buffers, start)

    monkeypatch.setattr(open_shards.os, "pread", noted)
    monkeypatch.setattr(open_shards.os, "preadv", noted_into)
    return sizes


def entries_of(dataset: DatasetRef) -> tuple[ShardEntry, ...]:
    return manifest.load(dataset.uri).shards


def opened(dataset: DatasetRef) -> OpenShards:
    return OpenShards(manifest.root_of(dataset.uri), entries_of(dataset))


def test_a_shard_that_is_asked_for_again_is_read_once_more_and_whole(dataset, reads):
    reader = ShardReader(dataset.uri, cache_mib=0)
    everything = np.arange(len(reader))
    first = reader.gather(everything)
    singly = len(reads)
    assert singly == len(reader)
    for _ in range(3):
        again = reader.gather(everything)
        assert np.array_equal(again.images, first.images)
        assert (again.keys, again.captions) == (first.keys, first.captions)
    assert sorted(reads[singly:]) == sorted(entry.bytes for entry in entries_of(dataset))


def test_large_pictures_are_read_one_by_one(dataset, reads, monkeypatch):
    monkeypatch.setattr(open_shards, "SMALL_PICTURE", 100)
    reader = ShardReader(dataset.uri, cache_mib=0)
    for _ in range(3):
        reader.gather(np.arange(len(reader)))
    assert len(reads) == 3 * len(reader)


def held(shards: OpenShards, reads: list[int]) -> set[int]:
    """Shards whose bytes come without a call of the system."""
    found = set()
    for number, shard in shards._open.items():
        before = len(reads)
        shard.read(1, 0)
        found |= {number} if len(reads) == before else set()
    return found


def test_memory_stays_within_its_bound_and_goes_to_the_shards_in_use(dataset, reads, monkeypatch):
    sizes = [entry.bytes for entry in entries_of(dataset)]
    monkeypatch.setattr(open_shards, "WHOLE_BYTES", max(sizes) * 2)
    shards = opened(dataset)
    for _ in range(4):
        for number in (0, 1, 2):  # three in use, and room for two: these stay, and take no turns
            shards.get(number)
    assert held(shards, reads) == {0, 1}
    assert sum(size in sizes for size in reads) == 2
    for _ in range(20):
        for number in (3, 4, 5):
            shards.get(number)
    assert len(held(shards, reads)) == 2
    assert held(shards, reads) <= {3, 4, 5}
    assert sum(size in sizes for size in reads) == 4


def test_what_is_forgotten_leaves_the_memory(dataset, reads, monkeypatch):
    sizes = [entry.bytes for entry in entries_of(dataset)]
    monkeypatch.setattr(open_shards, "WHOLE_BYTES", max(sizes))
    shards = opened(dataset)
    for number in (0, 0, 1, 1):
        shards.get(number)
    assert held(shards, reads) == {0}
    shards.forget(0)
    for number in (0, 1, 1):
        shards.get(number)
    assert held(shards, reads) == {1}


def test_a_block_that_cannot_be_read_costs_its_pictures_alone(dataset, monkeypatch):
    entry = entries_of(dataset)[0]
    index = opened(dataset).get(0).index
    bad, pread, preadv = int(index[2]["image_offset"]), os.pread, os.preadv

    def check(descriptor: int, size: int, start: int) -> None:
        if start <= bad < start + size and os.fstat(descriptor).st_ino == path.stat().st_ino:
            raise OSError(5, "Input/output error")

    def failing(descriptor: int, size: int, start: int) -> bytes:
        check(descriptor, size, start)
        return pread(descriptor, size, start)

    def failing_into(descriptor: int, buffers: list[np.ndarray], start: int) -> int:
        check(descriptor, sum(buffer.nbytes for buffer in buffers), start)
        return preadv(descriptor, buffers, start)

    path = Path(dataset.uri).parent.parent / entry.tar
    monkeypatch.setattr(open_shards.os, "pread", failing)
    monkeypatch.setattr(open_shards.os, "preadv", failing_into)
    reader = ShardReader(dataset.uri, cache_mib=0, max_damaged=0.1)
    wanted = [row.key for shard in SHARDS for row in shard]
    wanted[2] = wanted[3]
    for _ in range(3):
        assert reader.gather(np.arange(len(reader))).keys == wanted
    assert (reader.damage.count, reader.damage.news[0].key) == (1, SHARDS[0][2].key)


def test_a_shard_cut_off_before_it_is_read_whole_is_damaged_and_afterwards_is_whole(dataset):
    reader = ShardReader(dataset.uri, cache_mib=0, max_damaged=0.4)
    everything = np.arange(len(reader))
    reader.gather(everything)
    cut = Path(dataset.uri).parent.parent / entries_of(dataset)[1].tar
    data = cut.read_bytes()
    os.truncate(cut, len(data) // 2)
    found = reader.gather(everything)
    assert reader.damage.count == sum(row.image not in data[: len(data) // 2] for row in SHARDS[1]) > 0
    assert found.keys[:4] == [row.key for row in SHARDS[0]]
    os.truncate(Path(dataset.uri).parent.parent / entries_of(dataset)[0].tar, 0)  # held in memory by now
    again = reader.gather(everything)
    assert np.array_equal(again.images, found.images)


def test_memory_is_used_again_and_never_while_somebody_reads_it(dataset):
    entries = entries_of(dataset)
    root = Path(dataset.uri).parent.parent
    tars = [(root / entry.tar).read_bytes() for entry in entries]
    shards = opened(dataset)

    def whole(number: int) -> memoryview:
        for _ in range(2):
            shards.get(number)
        return shards.get(number).read(entries[number].bytes, 0)

    kept = whole(0)[512:2048]  # a part of it is enough
    shards.forget(0)
    for number in (1, 2, 3):
        assert whole(number) == tars[number]
        shards.forget(number)
    assert kept == tars[0][512:2048]
    assert shards._buffers.bytes == 2 * open_shards._rounded(
        max(map(len, tars))
    )  # the one kept, and one for the others
    del kept
    views = [whole(number) for number in range(4)]
    assert views == tars[:4]
    assert shards._buffers.bytes == 4 * open_shards._rounded(max(map(len, tars)))


def test_a_process_that_is_forked_writes_into_memory_of_its_own(dataset):
    """As the workers of a loader do: both processes have the same memory free."""
    entries = entries_of(dataset)
    shards = opened(dataset)
    tars = [(Path(dataset.uri).parent.parent / entry.tar).read_bytes() for entry in entries]
    views: list[memoryview] = []

    def read_whole(number: int) -> None:
        for _ in range(2):
            shards.get(number)
        views[:] = [shards.get(number).read(entries[number].bytes, 0)]
        assert views == [tars[number]]
        assert views[0].readonly

    def go_on() -> None:
        views.clear()
        shards.forget(0)
        read_whole(1)
        assert shards._buffers.bytes == open_shards._rounded(len(tars[1]))  # it lies where the other lay

    read_whole(0)
    child = get_context("fork").Process(target=go_on)
    child.start()
    child.join()
    assert child.exitcode == 0
    assert views == [tars[0]]


def test_memory_for_shards_of_other_sizes_is_made_within_the_bound(tmp_path, monkeypatch):
    """A few large shards, then many small ones: the memory of the large ones is given back."""
    shards = [[sample(100 * n + i, 8) for i in range(pictures)] for n, pictures in enumerate([40] * 3 + [4] * 15)]
    dataset = publish(LocalFolder(tmp_path), tmp_path, shards, 8)
    entries = entries_of(dataset)
    bound = sum(open_shards._rounded(entry.bytes) for entry in entries[:3])
    monkeypatch.setattr(open_shards, "WHOLE_BYTES", bound)
    opened_shards = opened(dataset)
    for _ in range(6):
        for number in range(3):
            opened_shards.get(number)
    assert opened_shards._buffers.bytes == bound
    for _ in range(6):
        for number in range(3, len(entries)):
            opened_shards.get(number)
    assert opened_shards._whole_bytes == sum(entry.bytes for entry in entries[3:])
    assert opened_shards._buffers.bytes <= bound
    assert all(
        opened_shards.get(n).read(100, 512) == (tmp_path / entries[n].tar).read_bytes()[512:612] for n in range(3, 9)
    )
