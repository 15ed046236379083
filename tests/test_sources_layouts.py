"""Layouts that other programs leave: img2dataset's output, EDM zips, IDX files."""

import gzip
import json
import struct
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import webdataset as wds

from diffusion.data.images import decode_png
from diffusion.data.sources import BadSource, Caption, describe, open_source, read_item
from tests.made_sources import fill, items, picture, read, said, zipped
from tests.made_tables import idx

FASHION = Path("/usr/share/datasets/fashion-mnist")


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
