"""The requests that a plan foretells of a real S3 server are those that it gets."""

from collections import Counter
from pathlib import Path

import pytest

from diffusion.data import ingest, manifest
from diffusion.data.reader import ShardReader
from diffusion.data.reading_order import order_of
from diffusion.data.stream import batches
from diffusion.planning import requests
from diffusion.planning.requests import Requests
from diffusion.planning.work import Pictures, sharding_of
from diffusion.presets import PRESETS
from diffusion.recipe import ShardRecipe
from diffusion.store.cache import ShardCache
from diffusion.store.storage import open_storage
from tests.integration.test_shard_s3 import uploaded
from tests.s3_server import S3Server

RECIPE = ShardRecipe(resolution=16, shard_size=8, holdout=0.2)
FEW = 3  # requests of a kind that begin or end a thing, whose number hangs on nothing


def counted(s3: S3Server, before: int) -> Requests:
    """As S3 prices them: a LIST is a GET of a bucket."""
    kinds: Counter[str] = Counter()
    for request in s3.requests()[before:]:
        listing = request.method == "GET" and "list-type=2" in request.query
        kinds["LIST" if listing else "PUT" if request.method == "POST" else request.method] += 1
    return Requests(get=kinds["GET"], head=kinds["HEAD"], put=kinds["PUT"], list=kinds["LIST"], delete=kinds["DELETE"])


def agree(found: Requests, foretold: Requests) -> None:
    for kind in ("get", "head", "put", "list", "delete"):
        assert getattr(found, kind) == pytest.approx(getattr(foretold, kind), abs=FEW), kind


def test_sharding_and_reading(s3: S3Server, emoji_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(requests, "PAGE", 100)  # as this server lists
    source = uploaded(emoji_folder, open_storage(f"{s3.bucket()}/pictures"))
    root = open_storage(f"{s3.bucket()}/data")
    before = len(s3.requests())
    ref = ingest.shard_dataset(source.uri, RECIPE, root, tmp_path / "work")
    made = manifest.load(ref.uri)
    found = counted(s3, before)
    count = ref.images + ref.holdout
    planned = sharding_of(Pictures((count,), 1e5, 5_000), RECIPE)
    assert abs(len(made.shards) - planned.shards) <= 1  # which are held out hangs on their content
    shards = {"chunks": planned.chunks, "chunk_bytes": 1e5, "shard_bytes": 1e5, "index_bytes": planned.index_bytes}
    extra = Requests(get=1)  # metadata.jsonl, beside the pictures; `load` above is a GET as well
    agree(
        found,
        requests.source_read(count, 1) + requests.shards_made(count, shards=len(made.shards), **shards) + extra,
    )

    recipe = PRESETS["smoke"]().train
    cache = ShardCache(tmp_path / "copies", 2**30)
    before = len(s3.requests())
    for _ in range(2):  # workers of one machine, with its copies
        reader = ShardReader(ref.uri, shards=cache, cache_mib=0)
        for batch in batches(reader, order_of(made, "train", recipe), 8, stop=2 * len(reader) // 8 * 8, threads=0):
            assert len(batch.keys) == 8
    train = made.entries("train")
    foretold = requests.training_read(
        workers=2,
        nodes=1,
        shards=len(train),
        shard_bytes=max(entry.bytes for entry in train),
        index_bytes=planned.index_bytes,
        epochs=2,
        cache_bytes=2**30,
    )
    agree(counted(s3, before), foretold)
