"""Sources in a bucket, by the same path as folders; and places that are not read."""

import gzip
import os
import random
from pathlib import Path
from threading import Lock
from time import sleep

import numpy as np
import pytest

from diffusion.data.images import decode_png
from diffusion.data.sources import BadSource, Caption, open_source, places, read_item
from diffusion.store import s3
from diffusion.store.storage import LocalFolder, StorageUnavailable
from tests.made_archives import FILES, tarred
from tests.made_sources import fill, items, lines, picture, read, said, zipped
from tests.made_tables import idx, parquet_of, write_table


class Bucket:
    """A folder behind the storage's interface alone, as S3 is."""

    def __init__(self, uri: str, folder: Path) -> None:
        self.uri, self._folder, self.asked = uri, LocalFolder(folder), 0

    def read(self, name: str, start: int = 0, size: int | None = None) -> bytes:
        self.asked += 1
        return self._folder.read(name, start, size)

    def size(self, name: str) -> int | None:
        return self._folder.size(name)

    def walk(self, prefix: str = ""):
        return self._folder.walk(prefix)


@pytest.fixture
def bucket(tmp_path, monkeypatch) -> Path:
    """The folder of s3://bucket."""
    buckets: dict[str, Bucket] = {}

    def prefix(uri: str, **_: object) -> Bucket:
        return buckets.setdefault(uri, Bucket(uri, tmp_path / uri.removeprefix("s3://")))

    monkeypatch.setattr(s3, "S3Prefix", prefix)
    places.storage_at.cache_clear()
    yield tmp_path / "bucket"
    places.storage_at.cache_clear()


def test_a_bucket_is_read_as_a_folder_is(bucket):
    fill(
        bucket / "p",
        {
            "a/1.png": picture("#000001"),
            "a/1.txt": "beside",
            "b/2.png": picture("#000002"),
            "b/.hidden.png": "",
            "metadata.jsonl": lines({"file_name": "b/2.png", "label": "named"}),
        },
    )
    source = open_source("s3://bucket/p/")
    assert said(source) == said(bucket / "p")
    assert said(source) == [("a/1.png", "a", (Caption("beside"),), {}), ("b/2.png", "named", (), {})]
    assert read(source, "b/2.png") == picture("#000002")
    with pytest.raises(BadSource, match="holds no pictures"):
        open_source("s3://bucket/nothing")


def test_texts_beside_pictures_are_asked_of_a_bucket_many_at_once_and_stay_in_order(bucket, monkeypatch):
    names = [f"a/{number:03d}" for number in range(80)]
    fill(bucket, {f"{name}.png": picture() for name in names} | {f"{name}.txt": f"of {name}" for name in names})
    under_way, most, draw = 0, 0, random.Random(1)
    read_one, counting = Bucket.read, Lock()

    def slowly(*arguments: object) -> bytes:
        nonlocal under_way, most
        with counting:
            under_way += 1
            most = max(most, under_way)
        sleep(draw.random() / 100)  # answers come in another order than the questions
        with counting:
            under_way -= 1
        return read_one(*arguments)

    monkeypatch.setattr(Bucket, "read", slowly)
    assert [item.captions for item in items(open_source("s3://bucket"))] == [(Caption(f"of {name}"),) for name in names]
    assert 1 < most <= 16
    fill(bucket, {"a/040.txt": b"\xff"})
    with pytest.raises(BadSource, match=r"a/040.txt is not UTF-8"):
        open_source("s3://bucket")


def test_archives_and_tables_in_a_bucket(bucket):
    files = {**FILES, **{f"c/{number}.png": os.urandom(3_000) for number in range(100)}}
    for name in (zipped(bucket.parent / "s.zip", files), tarred(bucket.parent / "s.tar", files)):
        bucket.mkdir(exist_ok=True)
        name.rename(bucket / name.name)
        local, remote = open_source(bucket / name.name), open_source(f"s3://bucket/{name.name}")
        assert said(remote) == said(local)
        assert places.storage_at("s3://bucket").asked < 10  # not one request per file
        assert [read_item(remote.uri, item.place) for item in items(remote)] == [
            read_item(local.uri, item.place) for item in items(local)
        ]
        places.storage_at("s3://bucket").asked = 0
    assert said(open_source("s3://bucket/*.tar")) == said(bucket / "*.tar")
    assert said(open_source("s3://bucket/{s,s}.tar")) == said(bucket / "{s,s}.tar")
    fill(bucket / "x", {"p/1.png": picture(), "p/2.png": picture()})
    write_table(bucket / "x" / "t.csv", [{"path": "p/1.png", "text": "one"}])
    table = open_source("s3://bucket/x/t.csv")
    assert said(table) == said(bucket / "x" / "t.csv") == [("p/1.png", "p", (Caption("one"),), {})]
    assert read(table, "p/1.png") == picture()
    parquet_of(bucket / "held.parquet", {"image": [picture()]})
    assert read(open_source("s3://bucket/held.parquet"), "held.parquet/000000000") == picture()
    (bucket / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(np.full((2, 3, 4), 7, np.uint8))))
    (bucket / "train-labels-idx1-ubyte").write_bytes(idx(np.array([5, 6], np.uint8)))
    family = open_source("s3://bucket/train-images-idx3-ubyte.gz")
    assert [item.label for item in items(family)] == ["5", "6"]
    assert decode_png(read(family, "train/000001.png")).tolist() == [[[7] * 3] * 4] * 3
    for missing in ("s3://bucket/no.tar", "s3://bucket/no*.tar", "s3://bucket/no.csv"):
        with pytest.raises(BadSource, match=r"does not exist|no file is there"):
            open_source(missing)


def test_a_storage_that_does_not_answer_is_no_bad_picture(bucket, monkeypatch):
    fill(bucket, {"a/1.png": picture()})
    source = open_source("s3://bucket")

    def fail(*_: object) -> bytes:
        raise StorageUnavailable("no answer")

    monkeypatch.setattr(Bucket, "read", fail)
    with pytest.raises(StorageUnavailable):
        read(source, "a/1.png")
    fill(bucket, {"metadata.jsonl": lines({"file_name": "a/1.png"})})
    with pytest.raises(StorageUnavailable):
        open_source("s3://bucket")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("pipe:cat x.tar", "is a command, and none is run"),
        ("https://example.org/x.zip", "copy it to a folder or a bucket"),
        ("gs://bucket/x", "copy it to a folder or a bucket"),
    ],
)
def test_places_that_are_not_read_are_refused(source, message):
    with pytest.raises(BadSource, match=message):
        open_source(source)
