"""Reading a dataset from a real S3 server: the same batches as from a folder, each shard asked for once, faults or not."""

from pathlib import Path

import numpy as np
import pytest
import torch

from diffusion.data.order import Order
from diffusion.data.reader import ShardReader
from diffusion.data.stream import Batch, batches
from diffusion.store.cache import ShardCache
from diffusion.store.refs import DatasetRef
from diffusion.store.storage import LocalFolder, open_storage
from tests.dataset_of import publish, sample
from tests.faulty_proxy import FaultyProxy
from tests.s3_server import S3Server

SIDE = 16
SAMPLES = [sample(i, SIDE, [(f"picture {i}", 1.0), ("another", 2.0)][: i % 3]) for i in range(330)]
SHARDS = [SAMPLES[start : start + 50] for start in range(0, 330, 50)]


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> DatasetRef:
    root = tmp_path_factory.mktemp("root")
    return publish(LocalFolder(root), root, SHARDS, SIDE)


@pytest.fixture(scope="module")
def remote(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> DatasetRef:
    return publish(open_storage(f"{s3.bucket()}/data"), tmp_path_factory.mktemp("work"), SHARDS, SIDE)


def read(reader: ShardReader, threads: int = 2) -> list[Batch]:
    order = Order(len(reader), 50, seed=3, window=64, streams=2)
    return list(batches(reader, order, 20, start=40, stop=700, threads=threads, seed=1))


def equal(ours: list[Batch], theirs: list[Batch]) -> bool:
    return len(ours) == len(theirs) and all(
        torch.equal(a.images, b.images) and torch.equal(a.label, b.label) and a[2:4] == b[2:4]
        for a, b in zip(ours, theirs, strict=True)
    )


def test_the_batches_are_those_of_a_folder_and_every_shard_is_asked_for_once(s3, local, remote, tmp_path):
    assert remote.digest == local.digest
    wanted = read(ShardReader(local.uri))
    before = len(s3.requests())
    cache = ShardCache(tmp_path, 2**30)
    assert equal(read(ShardReader(remote.uri, digest=remote.digest, shards=cache)), wanted)
    tars = [request.path for request in s3.requests()[before:] if request.path.endswith(".tar")]
    assert len(set(tars)) == len(SHARDS)
    again = len(s3.requests())
    assert equal(read(ShardReader(remote.uri, shards=cache), threads=0), wanted)
    assert not [request for request in s3.requests()[again:] if request.path.endswith(".tar")]


def test_single_pictures_are_ranges(s3, local, remote):
    before = len(s3.requests())
    far = ShardReader(remote.uri)
    for i in (3, 77):
        near, got = ShardReader(local.uri).read(i), far.read(i)
        assert np.array_equal(near.image, got.image)
        assert (near.key, near.label, near.captions) == (got.key, got.label, got.captions)
    asked = [request for request in s3.requests()[before:] if request.path.endswith(".tar")]
    assert len(asked) == 2


def test_a_network_that_fails_changes_no_batch(s3, local, remote, tmp_path: Path, monkeypatch):
    wanted = read(ShardReader(local.uri))
    with FaultyProxy(s3.url, seed=5, rate=0.4, kinds=("reset", "reset after", "500", "503", "truncated")) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        far = ShardReader(remote.uri, shards=ShardCache(tmp_path, 2**30))
        assert equal(read(far), wanted)
        assert sum(proxy.injected.values()) >= 5
    assert far.damage.count == 0
