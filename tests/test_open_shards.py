"""Shards in use are held in memory, as many as there is room for; what is held changes no byte and hides no damage."""

import os
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
    pread = os.pread

    def noted(descriptor: int, size: int, start: int) -> bytes:
        sizes.append(size)
        return pread(descriptor, size, start)

    monkeypatch.setattr(open_shards.os, "pread", noted)
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
    bad, pread = int(index[2]["image_offset"]), os.pread

    def failing(descriptor: int, size: int, start: int) -> bytes:
        if start <= bad < start + size and os.fstat(descriptor).st_ino == path.stat().st_ino:
            raise OSError(5, "Input/output error")
        return pread(descriptor, size, start)

    path = Path(dataset.uri).parent.parent / entry.tar
    monkeypatch.setattr(open_shards.os, "pread", failing)
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
