"""From a bucket to batches while everything goes wrong that does (`tests/faults.py`): the same bytes, the same batches."""

from pathlib import Path

import pytest

from diffusion.data import datasets, ingest, manifest
from diffusion.data.damage import TooMuchDamage
from diffusion.data.lint import lint
from diffusion.data.reader import ShardReader
from diffusion.store.refs import DatasetRef
from diffusion.store.storage import open_storage
from tests.faults import (
    BATCH,
    KINDS,
    RECIPE,
    Network,
    NoDisk,
    damage_at_rest,
    on_small_disk,
    pictures,
    read,
    read_with_kills,
    repaired,
    shard_with_kills,
    through,
    uploaded,
)
from tests.faulty_proxy import FLIPPED
from tests.published import identity
from tests.s3_server import S3Server


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    return pictures(tmp_path_factory.mktemp("pictures"), 90)


@pytest.fixture(scope="module")
def plain(files, tmp_path_factory) -> DatasetRef:
    """The dataset as the disk has it."""
    return ingest.shard_dataset(files, RECIPE, tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def source(s3: S3Server, files) -> str:
    uploaded(files, storage := open_storage(f"{s3.bucket()}/pictures"))
    return storage.uri


@pytest.fixture
def remote(s3: S3Server, source, tmp_path) -> str:
    """The dataset in a bucket of its own."""
    return ingest.shard_dataset(source, RECIPE, f"{s3.bucket()}/data", tmp_path / "work").uri


def stop_of(reader: ShardReader) -> int:
    """A little more than two epochs, in whole batches."""
    return (2 * len(reader) // BATCH + 1) * BATCH


def small_disk(what: str, *arguments: object) -> list:
    try:
        return on_small_disk(what, *arguments)
    except NoDisk as error:
        pytest.skip(str(error))


def test_killed_and_behind_a_faulty_network_sharding_comes_to_the_same_digest(s3, source, plain, tmp_path):
    with Network(s3.url, seed=1) as network, through(network) as environment:
        uri, kills, _ = shard_with_kills(environment, source, f"{s3.bucket()}/data", tmp_path / "shard")
    assert kills > 2
    assert network.injected.total() > 20
    assert manifest.load(uri).digest == plain.digest
    assert lint(datasets.opened(uri)) == []


def test_ranks_that_come_and_go_read_the_same_batches_over_a_faulty_network(s3, remote, plain, tmp_path):
    """Through one cache with room for a quarter of the shards, whose copies are damaged whenever all ranks are dead."""
    reader = ShardReader(plain.uri)
    stop = stop_of(reader)
    with Network(s3.url, seed=2, kinds=(*KINDS, *[FLIPPED] * 8)) as network, through(network) as environment:
        reading = read_with_kills(environment, remote, reader, stop, tmp_path / "read")
    assert network.injected.total() > 20
    assert network.injected[FLIPPED]
    assert reading.kills
    assert reading.spoilt
    assert reading.seen == list(read(reader, 0, stop))
    keys = [key for batch in reading.seen for key, _ in batch]
    for epoch in range(2):
        assert sorted(keys[epoch * len(reader) :][: len(reader)]) == sorted(reader.keys)


@pytest.mark.parametrize(("work", "step"), [("", 2**17), ("work", 2**14)], ids=["all on it", "work elsewhere"])
def test_a_disk_that_is_full_again_and_again_delays_sharding_alone(files, plain, tmp_path, work, step):
    work = work and tmp_path / work
    said, digest = small_disk("shard_on_small_disk", files, tmp_path / "disk", tmp_path / "kept", work, step)
    assert len(said) > 5
    assert [message for message in said if "free some, and the same command goes on" not in message] == []
    assert digest == plain.digest
    assert identity(f"{tmp_path}/kept/{manifest.place_of(digest)}") == identity(plain.uri)
    assert {path.name for path in (tmp_path / "kept").iterdir()} == {"datasets", "heads", "quarantine", "shards"}


def test_a_cache_on_a_disk_that_is_full_again_and_again_delays_reading_alone(s3, remote, plain, tmp_path):
    reader = ShardReader(plain.uri)
    said, seen = small_disk("read_on_small_disk", remote, tmp_path / "disk", stop_of(reader))
    assert len(said) > 1
    assert all("free some, or give the cache a bound below" in message for message in said)
    assert seen == list(read(reader, 0, stop_of(reader)))


@pytest.mark.parametrize(("where", "seed"), [("folder", 0), ("folder", 1), ("bucket", 2)])
def test_damage_at_rest_is_found_named_and_made_good(s3, files, source, plain, tmp_path, where, seed):
    source, root = (files, tmp_path / "data") if where == "folder" else (source, f"{s3.bucket()}/data")
    uri = ingest.shard_dataset(source, RECIPE, root, tmp_path / "work").uri
    damaged = damage_at_rest(uri, seed)
    assert {finding.place for finding in lint(datasets.opened(uri))} == set(damaged)
    reader = ShardReader(uri, cache_mib=0)
    with pytest.raises(TooMuchDamage, match=r"remove it and the manifest.json of its dataset, and make them again"):
        list(read(reader, 0, stop_of(reader)))
    assert repaired(uri, source, tmp_path / "work") == uri
    assert manifest.load(uri).digest == plain.digest
    assert lint(datasets.opened(uri)) == []
