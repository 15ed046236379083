"""Sources in a bucket of a real S3 server: what a folder says, the bucket says too."""

import gzip
from pathlib import Path

import numpy as np
import pytest

from diffusion.data.images import BadPicture
from diffusion.data.sources import BadSource, Caption, open_source, original_of, read_item
from diffusion.data.sources.items import NO_PARTS
from diffusion.store.storage import StorageRefused, open_storage
from tests.made_archives import tarred, webdataset_tar
from tests.made_sources import fill, items, lines, picture, said, zipped
from tests.made_tables import ROWS, idx, parquet_of, write_table
from tests.s3_server import S3Server


def upload(folder: Path, uri: str) -> None:
    storage = open_storage(uri)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            storage.put(path.relative_to(folder).as_posix(), path)


@pytest.fixture(scope="module")
def both(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder of sources of every kind, and a bucket with the same."""
    folder = tmp_path_factory.mktemp("local")
    named = {"a/1.png": picture("#000001"), "a/1.txt": "beside", "b/ü +%.png": picture("#000002"), "b/.hidden.png": ""}
    fill(folder / "folder", {**named, "metadata.jsonl": lines({"file_name": "b/ü +%.png", "label": "named", "x": [1]})})
    many = {f"c/{number:03d}.png": picture(f"#{number:06x}") for number in range(200)}
    zipped(folder / "s.zip", {**many, "c/000.txt": "beside"})
    tarred(folder / "s.tar", {**many, "metadata.csv": "file_name,text\nc/003.png,three\n"})
    (folder / "shards").mkdir()
    for shard in range(3):
        samples = [
            {"__key__": f"{n}", "png": picture(f"#00{shard:02x}{n:02x}"), "cls": n % 2, "txt": f"{n}"} for n in range(9)
        ]
        webdataset_tar(folder / "shards" / f"{shard:03d}.tar", samples)
    fill(folder / "table", {row["path"]: picture(f"#00000{row['n']}") for row in ROWS})
    for ending in ("csv", "parquet"):
        write_table(folder / "table" / f"t.{ending}", ROWS)
    parquet_of(
        folder / "held.parquet", {"image": [picture(), picture("#123456")], "text": ["a", "b"]}, row_group_size=1
    )
    (folder / "idx").mkdir()
    grey = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)
    (folder / "idx" / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(grey)))
    (folder / "idx" / "train-labels-idx1-ubyte").write_bytes(idx(np.array([5, 6], np.uint8)))
    uri = s3.bucket()
    upload(folder, uri)
    return folder, uri


@pytest.mark.parametrize(
    "name",
    [
        "folder",
        "s.zip",
        "s.tar",
        "shards",
        "shards/*.tar",
        "shards/{000..002}.tar",
        "table/t.csv",
        "table/t.parquet",
        "held.parquet",
        "idx",
        "idx/train-images-idx3-ubyte.gz",
    ],
)
def test_a_bucket_says_what_a_folder_says(both: tuple[Path, str], name: str) -> None:
    folder, uri = both
    local, remote = open_source(folder / name), open_source(f"{uri}/{name}")
    assert said(remote) == said(local)
    assert (remote.kind, len(remote) > 1) == (local.kind, True)
    assert [item.size for item in items(remote)] == [item.size for item in items(local)]
    for here, there in zip(items(local), items(remote), strict=True):
        assert read_item(remote.uri, there.place) == read_item(local.uri, here.place)
    assert open_source(f"{uri}/{name}").fingerprint == remote.fingerprint


def test_unsafe_keys_are_set_aside_one_by_one_as_in_a_folder(s3: S3Server, tmp_path: Path) -> None:
    named = {"a/1.png": picture("#000001"), "a/2\n.png": picture("#000002"), "b\\c/3.png": picture("#000003")}
    uri = s3.bucket()
    for name, data in fill_all(s3, uri, named).items():
        fill(tmp_path, {name: data})
    assert said(open_source(uri)) == said(open_source(tmp_path))
    beyond = {"a//4.png": picture("#000004"), "../5.png": picture("#000005"), "a/./6.png": picture("#000006")}
    fill_all(s3, uri, beyond)
    source, kept = open_source(uri), {}
    for item in source.items():
        if item.name == "a/1.png":
            assert read_item(source.uri, item.place) == named["a/1.png"]
            continue
        with pytest.raises(BadPicture, match="unsafe name: the name h"):
            read_item(source.uri, item.place)
        kept[item.name] = read_item(source.uri, original_of(item.place))
    assert sorted(kept.values()) == sorted([*list(named.values())[1:], *beyond.values()])
    assert not any(part in NO_PARTS for name in kept for part in name.split("/"))


def fill_all(s3: S3Server, uri: str, objects: dict[str, bytes]) -> dict[str, bytes]:
    """Put objects under keys that our own storage refuses to write."""
    for key, data in objects.items():
        s3.client.put_object(Bucket=uri.removeprefix("s3://"), Key=key, Body=data)
    return objects


def test_an_archive_is_listed_with_few_requests(both: tuple[Path, str], s3: S3Server) -> None:
    _, uri = both
    for name in ("s.zip", "s.tar", "shards/000.tar"):
        before = len(s3.requests())
        source = open_source(f"{uri}/{name}")
        assert len(s3.requests()) - before < 8
        item = next(source.items())
        before = len(s3.requests())
        read_item(source.uri, item.place)
        assert len(s3.requests()) - before == 1


def test_a_changed_object_changes_the_fingerprint(s3: S3Server) -> None:
    uri = s3.bucket()
    storage = open_storage(uri)
    storage.put("a/1.png", picture())
    before = open_source(uri).fingerprint
    storage.put("a/1.txt", b"said now")
    captioned = open_source(uri)
    assert next(captioned.items()).captions == (Caption("said now"),)
    storage.put("a/1.png", picture("#000000"))
    assert len({before, captioned.fingerprint, open_source(uri).fingerprint}) == 3


def test_what_is_not_there_is_refused(s3: S3Server) -> None:
    uri = s3.bucket()
    with pytest.raises(BadSource, match="holds no pictures"):
        open_source(f"{uri}/nothing")
    with pytest.raises(BadSource, match="does not exist"):
        open_source(f"{uri}/no.tar")
    with pytest.raises(StorageRefused, match="bucket"):
        open_source("s3://no-such-bucket-here/x")
