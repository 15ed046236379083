"""Tables, IDX files, EDM zips and img2dataset's output, by independent writers; and buckets, by the same path as folders."""

import gzip
import json
import os
import random
import struct
from pathlib import Path
from threading import Lock
from time import sleep

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset as wds
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion.data.images import BadPicture, decode_png
from diffusion.data.sources import (
    BadSource,
    Caption,
    describe,
    listing,
    open_source,
    parquet,
    places,
    read_item,
)
from diffusion.recipe import Columns
from diffusion.store import s3
from diffusion.store.storage import LocalFolder, StorageUnavailable
from tests.made_sources import fill, items, lines, picture, read, said, zipped
from tests.test_sources_archives import tarred

FASHION = Path("/usr/share/datasets/fashion-mnist")
ROWS = [
    {"path": "x/1.png", "caption": "one", "label": "cat", "n": 1},
    {"path": "x/2.png", "caption": "", "label": "dog", "n": 2},
    {"path": "3.png", "caption": "three, with a comma", "label": "cat", "n": 3},
]
SAID = [
    ("3.png", "cat", (Caption("three, with a comma"),), {"n": 3}),
    ("x/1.png", "cat", (Caption("one"),), {"n": 1}),
    ("x/2.png", "dog", (), {"n": 2}),
]


@pytest.fixture
def pictures(tmp_path) -> Path:
    return fill(tmp_path, {row["path"]: picture(f"#00000{row['n']}") for row in ROWS})


def write(path: Path, rows: list[dict]) -> Path:
    """A table by pandas."""
    frame = pd.DataFrame(rows)
    if path.suffix == ".jsonl":
        frame.to_json(path, orient="records", lines=True)
    elif path.suffix == ".parquet":
        frame.to_parquet(path, index=False, row_group_size=2)
    else:
        frame.to_csv(path, index=False, sep="\t" if path.suffix == ".tsv" else ",")
    return path


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "parquet"])
def test_tables_of_paths(pictures, ending):
    source = open_source(write(pictures / f"table.{ending}", ROWS))
    texts = ending in ("csv", "tsv")  # which know no numbers
    assert said(source) == [(*facts, {"n": str(x["n"])} if texts else x) for *facts, x in SAID]
    assert read(source, "x/2.png") == picture("#000002")
    before = source.fingerprint
    assert open_source(pictures / f"table.{ending}").fingerprint == before
    write(pictures / f"table.{ending}", [{**ROWS[0], "caption": "other"}, *ROWS[1:]])
    assert open_source(pictures / f"table.{ending}").fingerprint != before


def test_columns_are_named_where_they_are_not_usual(pictures, tmp_path_factory):
    rows = [
        {"photo": row["path"], "a": "first", "wa": 2.0, "b": ["x", "y"], "wb": [1.0, 0.25], "kind": row["n"]}
        for row in ROWS
    ]
    table = write(tmp_path_factory.mktemp("elsewhere") / "t.parquet", rows)
    with pytest.raises(
        BadSource, match=r"no column of pictures under a usual name .* it has photo, a, wa, b, wb, kind"
    ):
        open_source(table)
    columns = Columns(image="photo", captions=("a", "b"), weights=("wa", "wb"), label="kind", root=str(pictures))
    source = open_source(table, columns=columns)
    captions = (Caption("first", 2.0), Caption("x", 1.0), Caption("y", 0.25))
    assert said(source) == [
        ("3.png", "3", captions, {}),
        ("x/1.png", "1", captions, {}),
        ("x/2.png", "2", captions, {}),
    ]
    assert read(source, "x/1.png") == picture("#000001")
    absolute = write(table.with_name("absolute.csv"), [{**row, "path": str(pictures / row["path"])} for row in ROWS])
    assert {item.name for item in items(open_source(absolute, columns=Columns(root=str(pictures))))} == {
        row["path"] for row in ROWS
    }
    with pytest.raises(BadSource, match="no column wrong; it has "):
        open_source(table, columns=Columns(image="photo", label="wrong", root=str(pictures)))
    with pytest.raises(BadSource, match=r"paths are relative to .*; another folder is `root`"):
        open_source(table, columns=Columns(image="photo"))
    with pytest.raises(BadSource, match="is no table, so it has no columns"):
        open_source(pictures, columns=columns)
    with pytest.raises(ValueError, match="2 weights for 1 captions"):
        Columns(captions=("a",), weights=("x", "y"))


def test_a_table_reaches_nothing_through_links_out_of_its_folder(pictures, tmp_path_factory):
    outside = fill(tmp_path_factory.mktemp("outside"), {"secret.png": picture()})
    (pictures / "out").symlink_to(outside)
    (pictures / "y").symlink_to("x")
    (pictures / "link.png").symlink_to(outside / "secret.png")
    (pictures / "within.png").symlink_to("x/1.png")
    source = open_source(write(pictures / "t.csv", [{"path": "y/1.png"}, {"path": "within.png", "label": "x"}]))
    places = [item.place for item in source.items()]
    assert [read_item(source.uri, place) for place in places] == [(pictures / "x/1.png").read_bytes()] * 2
    moved = (pictures / "x/1.png").rename(pictures / "x/moved.png")
    (pictures / "x/1.png").symlink_to(outside / "secret.png")  # after the listing
    for place in places:
        with pytest.raises(BadPicture, match="it has become a link since it was listed"):
            read_item(source.uri, place)
    moved.rename(pictures / "x/1.png")
    for name, message in (("out/secret.png", "a link there leads out"), ("link.png", "is a link out of the source")):
        with pytest.raises(BadSource, match=message):
            open_source(write(pictures / "t.csv", [{"path": name}]))
    (linked := outside.parent / "linked").symlink_to(pictures)
    table = write(outside / "t.csv", [{"path": str(linked / "x/1.png")}])
    assert said(open_source(table, columns=Columns(root=str(linked)))) == [("x/1.png", "x", (), {})]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"path": "nowhere.png"}], r"the table names 1 files that are not there \(nowhere.png\)"),
        ([{"path": "../up.png"}], "t.jsonl line 1: path .* must be relative"),
        ([{"path": "/etc/passwd"}], "must be relative"),
        ([{"path": "3.png"}, {"path": "x/../3.png"}], "must be relative"),
        ([{"path": "3.png"}, {"path": "./3.png"}], "t.jsonl line 2: 3.png has a line already"),
        ([{"path": None}], "line 1: path is None"),
        ([{"url": "http://x/1.png"}], "web addresses alone, and nothing is downloaded"),
        ([{"path": "http://x/1.png"}], "web address, and nothing is downloaded"),
        ([{"path": "3.png", "caption": ["a", "b"], "weights": [1]}], "line 1: caption has 2 texts and 1 weights"),
        ([{"path": "3.png", "caption": {"text": "a", "wieght": 1}}], "caption has the key 'wieght'"),
        *(
            (
                [{"path": "3.png", "caption": "a", "weight": weight}],
                "line 1: caption has the weight .* from 1e-09 to 1e",
            )
            for weight in (0, -1, True, "heavy", {}, "inf", "nan", 1e308, 5e-324)
        ),
        ([{"path": "3.png", "label": "a"}, {"path": "x/1.png", "label": 1.5}], "line 2: label is 1.5"),
    ],
)
def test_rows_that_cannot_be_understood_are_refused_by_line(pictures, rows, message):
    (pictures / "t.jsonl").write_text(lines(*rows))
    with pytest.raises(BadSource, match=message):
        open_source(pictures / "t.jsonl")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "t.csv",
            'path,text\n3.png,a\n\n3.png,"open\nx/1.png,b\n',
            "row that begins in line 4 cannot .* line 5 .*closed",
        ),
        ("t.csv", 'path,text\n3.png,"a "b" c"\n', "begins in line 2 .* beyond line 2 .*written twice"),
        ("t.csv", f"path,text\n3.png,a\nx/1.png,{'a' * 200_000}\n", "begins in line 3 .* beyond line 3 .*131,072"),
        ("t.csv", 'path,text\n3.png,"a\nb"\nx/1.png,b,c\n', "line 4 has more fields"),
        ("t.csv", "path,label,label\n3.png,a,b\n", "t.csv has the column 'label' twice"),
        ("t.csv", "path;text\n3.png;a\n", "one column, 'path;text': is it separated by ';'"),
        ("t.tsv", "path,text\n3.png,a\n", "one column, 'path,text': is it separated by ','"),
        ("t.csv", "path,text\n", "t.csv has no rows"),
        ("t.csv", "", "t.csv has no rows"),
        ("t.jsonl", "", "t.jsonl has no rows"),
        ("t.jsonl", '{"path": "3.png", "label": "a", "label": "b"}\n', "line 1 .*the key 'label' stands there twice"),
    ],
)
def test_tables_that_would_be_misread_are_refused(pictures, name, text, message):
    (pictures / name).write_text(text)
    with pytest.raises(BadSource, match=message):
        open_source(pictures / name)


def test_a_quoted_field_may_hold_lines_and_quotes_and_a_row_may_be_short(pictures):
    (pictures / "t.csv").write_text('\npath,label,text,,\n3.png,a,"one\n""two"", three"\n\nx/1.png,a\n')
    captions = {item.name: item.captions for item in items(open_source(pictures / "t.csv"))}
    assert captions == {"3.png": (Caption('one\n"two", three'),), "x/1.png": ()}


@settings(deadline=None, max_examples=25)
@given(
    st.lists(
        st.tuples(st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=9), st.floats(1e-9, 1e9)),
        max_size=4,
    )
)
def test_captions_survive_metadata_however_they_are_written(tmp_path_factory, captions):
    folder = fill(tmp_path_factory.mktemp("c"), {"a/1.png": b""})
    expected = [("a/1.png", "a", tuple(Caption(*caption) for caption in captions), {})]
    texts, weights = [text for text, _ in captions], [weight for _, weight in captions]
    for row in (
        {"text": [{"text": text, "weight": weight} for text, weight in captions]},
        {"text": texts, "weights": weights},
        {"captions": texts, "weight": weights},
    ):
        fill(folder, {"metadata.jsonl": lines({"file_name": "a/1.png", **row})})
        assert said(folder) == expected


def parquet_of(path: Path, columns: dict, **how) -> Path:
    pq.write_table(pa.table(columns), path, **how)
    return path


def test_parquet_that_holds_pictures_in_rows(tmp_path):
    data = [picture(f"#00000{number}") for number in range(5)]
    held = pa.array([{"bytes": one, "path": f"{n}.png"} for n, one in enumerate(data)])
    for number, columns in enumerate(
        ({"image": held, "label": [0, 1, 0, 1, 0]}, {"png": data, "label": [0, 1, 0, 1, 0]})
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        whole = open_source(parquet_of(folder / "train-0.parquet", columns, row_group_size=2))
        assert [item.label for item in items(whole)] == ["0", "1", "0", "1", "0"]
        assert [read_item(whole.uri, item.place) for item in reversed(items(whole))] == data[::-1]
        parquet_of(
            folder / "train-1.parquet", {"image" if number == 0 else "png": columns["image" if number == 0 else "png"]}
        )
    with pytest.raises(BadSource, match="5 of 10 pictures have no class"):
        open_source(folder)
    (folder / "train-0.parquet").unlink()
    alone = open_source(folder)  # a table with nothing but pictures
    assert [(item.name, item.label, item.size) for item in items(alone)][:2] == [
        ("train-1.parquet/000000000", "picture", None),
        ("train-1.parquet/000000001", "picture", None),
    ]
    assert describe(alone)["bytes"] is None


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz", "parquet"])
@pytest.mark.parametrize("swapped", ["file", "folder"])
def test_an_archive_or_table_that_becomes_a_link_after_the_listing_is_not_read(tmp_path, kind, swapped):
    folders = [tmp_path / name / "a" for name in ("source", "secret")]
    for folder, colour in zip(folders, ("#111111", "#222222"), strict=True):
        folder.mkdir(parents=True)
        if kind == "zip":
            zipped(folder / "x.zip", {"1.png": picture(colour)})
        elif kind == "parquet":
            parquet_of(folder / "x.parquet", {"image": [{"bytes": picture(colour), "path": "1.png"}]})
        else:
            tarred(folder / f"x.{kind}", {"1.png": picture(colour)}, "w" if kind == "tar" else "w:gz")
    source = open_source(tmp_path / "source")
    (item,) = source.items()
    mine, secret = ((folder / f"x.{kind}") if swapped == "file" else folder for folder in folders)
    mine.rename(tmp_path / "moved")
    mine.symlink_to(secret)
    places.unpacked.cache_clear()  # as in another process
    with pytest.raises(BadPicture, match="it has become a link since it was listed"):
        read_item(source.uri, item.place)
    mine.unlink()
    (tmp_path / "moved").rename(mine)
    assert read_item(source.uri, item.place) == picture("#111111")


def test_parquet_values_that_json_lacks(tmp_path):
    columns = {
        "image": [picture(), None],
        "text": pa.array(["a", None]),
        "x": [float("nan"), 1.0],
        "raw": [b"left out", b""],
        "when": pd.to_datetime(["2020-01-01", "2021-01-01"]),
        "tags": [["a"], None],
        "s": [{"y": float("inf")}, None],
    }
    source = open_source(parquet_of(tmp_path / "t.parquet", columns))
    first, second = said(source)
    assert first[2:] == ((Caption("a"),), {"x": None, "tags": ["a"], "s": {"y": None}})
    assert second[2:] == ((), {"x": 1.0, "tags": None, "s": None})
    with pytest.raises(BadPicture, match="empty: the table has no picture in this row"):
        read(source, second[0])


def test_parquet_that_is_damaged_or_unwieldy_is_refused(tmp_path, monkeypatch):
    whole = parquet_of(tmp_path / "t.parquet", {"image": [picture()] * 4}).read_bytes()
    source = open_source(tmp_path / "t.parquet")
    place = items(source)[0].place
    for data in (b"", whole[:-20], whole[:4] + bytes(len(whole) - 12) + whole[-8:]):
        (tmp_path / "t.parquet").write_bytes(data)
        places._column.cache_clear()
        with pytest.raises(BadSource, match=r"t.parquet cannot be read as Parquet"):
            open_source(tmp_path / "t.parquet")
        with pytest.raises(BadPicture, match="unreadable"):
            read_item(source.uri, place)
    (tmp_path / "t.parquet").write_bytes(whole)
    monkeypatch.setattr(parquet, "_MAX_GROUP_BYTES", 10)
    with pytest.raises(BadSource, match=r"in one row group, .* row_group_size=1000"):
        open_source(tmp_path / "t.parquet")


def img2dataset(folder: Path, output: str) -> Path:
    """What img2dataset 1.47 leaves, as its writers do it: two shards, one picture of four not downloaded."""
    schema = ["caption", "url", "key", "status", "error_message", "width", "height", "similarity"]
    for shard in range(2):
        name, rows, held = f"{shard:05d}", [], []
        for number in range(4):
            done = number != 2
            row = dict(
                zip(schema, [f"caption {number}", "http://x", f"{shard:05d}{number:04d}"] + [None] * 5, strict=True)
            )
            row |= {"status": "success" if done else "failed_to_download", "width": 4 if done else None}
            rows.append(row | {"similarity": float("nan")})
            held.append(picture(f"#0000{shard}{number}") if done else None)
        folder.mkdir(exist_ok=True)
        good = [(row, data) for row, data in zip(rows, held, strict=True) if data]
        if output == "parquet":
            texts = [row["caption"] if data else None for row, data in zip(rows, held, strict=True)]
            frame = pd.DataFrame(rows).assign(txt=texts, jpg=held)
            frame.to_parquet(folder / f"{name}.parquet")
        else:
            pd.DataFrame(rows).to_parquet(folder / f"{name}.parquet")
        if output == "files":
            files = {}
            for row, data in good:
                files |= {f"{row['key']}.jpg": data, f"{row['key']}.txt": row["caption"]}
                files[f"{row['key']}.json"] = json.dumps(row, indent=4)
            fill(folder / name, files)
        if output == "webdataset":
            with wds.TarWriter(str(folder / f"{name}.tar")) as tar:
                for row, data in good:
                    sample = {"jpg": data, "txt": row["caption"], "json": json.dumps(row, indent=4)}
                    tar.write({"__key__": row["key"], **sample})
        (folder / f"{name}_stats.json").write_text(json.dumps({"count": 4, "successes": 3}))
    return folder


@pytest.mark.parametrize("output", ["files", "webdataset", "parquet"])
def test_img2dataset(tmp_path, output):
    source = open_source(img2dataset(tmp_path / "out", output))
    assert len(source) == 6
    facts = describe(source)
    assert facts["classes"] == {"picture": 6}  # the folders are numbers of shards
    assert facts["left out"] == ({"was not downloaded (img2dataset)": 2} if output == "parquet" else {})
    for number, item in enumerate(items(source)):
        shard, number = divmod(number, 3)
        number += number == 2
        assert item.captions == (Caption(f"caption {number}"),)
        assert item.extra["key"] == f"{shard:05d}{number:04d}"
        assert item.extra["similarity"] is None
        assert read_item(source.uri, item.place) == picture(f"#0000{shard}{number}")


def edm(path: Path, labels: object, **more: str) -> Path:
    files = {f"0000{number}/img0000000{number}.png": picture(f"#00000{number}") for number in range(3)}
    return zipped(path, {**files, "dataset.json": json.dumps({"labels": labels}), **more})


def test_edm_zips(tmp_path):
    names = [f"0000{number}/img0000000{number}.png" for number in range(3)]
    source = open_source(edm(tmp_path / "s.zip", [[name, 9 - number] for number, name in enumerate(names)]))
    assert said(source) == [(name, str(9 - number), (), {}) for number, name in enumerate(names)]
    assert source.kind == ".zip, EDM"
    null = open_source(edm(tmp_path / "null.zip", None))
    assert {item.label for item in items(null)} == {"picture"}
    for labels, message in (
        ([[names[0], 1]], f"no label for {names[1]}"),
        ([[name, 0] for name in [*names, "4.png"]], r"names 1 pictures that are not there \(first: 4.png\)"),
        ([[name, 0] for name in [*names, names[0]]], "has a label already"),
        ([[name, [0, 1]] for name in names], "must be one class index"),
        ([{"name": names[0]}], "is not .file name, class index"),
    ):
        with pytest.raises(BadSource, match=message):
            open_source(edm(tmp_path / "bad.zip", labels))
    with pytest.raises(BadSource, match=r"both dataset.json and metadata.jsonl"):
        open_source(edm(tmp_path / "bad.zip", None, **{"metadata.jsonl": ""}))
    other = {"a/1.png": picture(), "dataset.json": '{"info": "something else"}'}
    assert [item.label for item in items(zipped(tmp_path / "other.zip", other))] == ["a"]


def idx(values: np.ndarray) -> bytes:
    return struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape) + values.tobytes()


def test_idx_files(tmp_path):
    draw = np.random.default_rng(0)
    sets = {
        split: (draw.integers(0, 256, (n, 5, 7), np.uint8), np.arange(n) % 3)
        for split, n in (("train", 6), ("t10k", 3))
    }
    for split, (grey, labels) in sets.items():
        pack = gzip.compress if split == "train" else bytes
        end = ".gz" if split == "train" else ""
        (tmp_path / f"{split}-images-idx3-ubyte{end}").write_bytes(pack(idx(grey)))
        (tmp_path / f"{split}-labels-idx1-ubyte{end}").write_bytes(pack(idx(labels.astype(np.uint8))))
    source = open_source(tmp_path)
    assert [(item.name, item.label) for item in items(source)] == [
        (f"{split}/{number:06d}.png", str(number % 3))
        for split, count in (("t10k", 3), ("train", 6))
        for number in range(count)
    ]
    for item in items(source):
        split, number = item.name.removesuffix(".png").split("/")
        pixels = decode_png(read_item(source.uri, item.place))
        np.testing.assert_array_equal(pixels, np.repeat(sets[split][0][int(number)][..., None], 3, axis=2))
    one = open_source(tmp_path / "train-images-idx3-ubyte.gz")
    assert [item.label for item in items(one)] == ["0", "1", "2"] * 2
    assert read(one, "train/000004.png") == read(source, "train/000004.png")
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(BadSource, match="3 of 9 pictures have no class"):
        open_source(tmp_path)
    assert {item.label for item in items(tmp_path / "t10k-images-idx3-ubyte")} == {"picture"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no IDX file"),
        (struct.pack(">HBB3I", 0, 9, 3, 1, 2, 2) + bytes(4), "begins with 00 00 09 03"),
        (struct.pack(">HBB3I", 0, 8, 3, 2, 2, 2) + bytes(7), "23 bytes, and 2 x 2 x 2 numbers need 24"),
        (struct.pack(">HBB3I", 0, 8, 3, 2, 2, 2) + bytes(9), "25 bytes, and 2 x 2 x 2 numbers need 24"),
        (struct.pack(">HBB3I", 0, 8, 3, 2**31, 2**31, 2**31), "no pictures"),
        (idx(np.zeros((3, 2, 2), np.uint8)), "3 pictures and .* 2 labels"),
    ],
)
def test_idx_files_that_lie_are_refused(tmp_path, data, message):
    (tmp_path / "train-images-idx3-ubyte").write_bytes(data)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(np.zeros(2, np.uint8)))
    with pytest.raises(BadSource, match=message):
        open_source(tmp_path)


@pytest.mark.skipif(not FASHION.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_fashion_mnist_as_debian_packs_it():
    facts = describe(open_source(FASHION))
    assert facts["classes"] == {str(label): 7_000 for label in range(10)}


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
    from tests.test_sources_archives import FILES, tarred

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
    write(bucket / "x" / "t.csv", [{"path": "p/1.png", "text": "one"}])
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


def test_too_many_labels_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(listing, "MAX_LABELS", 2)
    with pytest.raises(BadSource, match="more than 2 different labels"):
        open_source(fill(tmp_path, {f"{label}/1.png": b"" for label in "abc"}))


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
