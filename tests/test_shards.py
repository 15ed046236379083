"""Shards: the same bytes, readable by the world, every offset right, damage named."""

import io
import json
import os
import tarfile
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion.data.images import decode_png, encode_png
from diffusion.data.shards import PackedSample, check_shard, put_shard, read_index, write_shard
from diffusion.store.storage import LocalFolder

MEMBERS = ("cls", "json", "png", "txt")


def sample(i: int, caption: str = "") -> PackedSample:
    image = np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    facts = {"source": f"é/{i}.png", "captions": [[caption, 1.0]] if caption else []}
    return PackedSample(f"{i:08x}", i % 3, facts, encode_png(image))


def written(folder: Path, samples) -> tuple[Path, object]:
    """The tar and the entry of a shard of these samples."""
    folder.mkdir(exist_ok=True, parents=True)
    entry = write_shard(folder, "train", samples)
    return folder / Path(entry.tar).name, entry


def test_equal_samples_give_equal_bytes_at_any_time(tmp_path, monkeypatch):
    samples = [sample(i, "a fox") for i in range(20)]
    path, first = written(tmp_path / "now", samples)
    monkeypatch.setattr(time, "time", lambda: 2_000_000_000.0)
    old = os.umask(0o077)
    try:
        later, second = written(tmp_path / "later", iter(samples))
    finally:
        os.umask(old)
    assert first == second
    assert path.read_bytes() == later.read_bytes()
    assert path.with_suffix(".npy").read_bytes() == later.with_suffix(".npy").read_bytes()
    assert {p.suffix for p in path.parent.iterdir()} == {".tar", ".npy"}


@given(
    st.lists(st.tuples(st.text(max_size=600), st.integers(0, 1400)), min_size=1, max_size=6), st.sampled_from([1, 7])
)
@settings(max_examples=40, deadline=None)
def test_the_bytes_are_those_of_tarfile_and_the_index_points_into_them(tmp_path_factory, contents, times):
    samples = []
    for i, (text, size) in enumerate(contents * times):
        caption = text.encode("utf-8", "replace").decode()
        facts = {"n": i, "captions": [[caption, 1.0], ["another", 0.5]] if caption else []}
        samples.append(PackedSample(f"{i:08x}", i, facts, bytes([i]) * size))
    folder = tmp_path_factory.mktemp("shard")
    path, entry = written(folder, samples)
    expected = io.BytesIO()
    with tarfile.open(fileobj=expected, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for s in samples:
            caption = s.facts["captions"][0][0] if s.facts["captions"] else ""
            facts = json.dumps(s.facts, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
            members = (str(s.label).encode(), facts.encode(), s.image, caption.encode())
            for extension, data in zip(MEMBERS, members, strict=True):
                info = tarfile.TarInfo(f"{s.key}.{extension}")
                info.size, info.mode, info.mtime = len(data), 0o444, 0
                tar.addfile(info, io.BytesIO(data))
    assert path.read_bytes() == expected.getvalue()
    storage = LocalFolder(folder / "root")
    put_shard(storage, folder, entry)
    index = read_index(storage, entry)
    assert (
        (entry.pictures, entry.bytes)
        == (len(samples), len(expected.getvalue()))
        == (len(index), storage.size(entry.tar))
    )
    for row, s in zip(index, samples, strict=True):
        assert (row["key"].decode(), row["label"], row["captions"]) == (s.key, s.label, len(s.facts["captions"]))
        assert storage.read(entry.tar, int(row["image_offset"]), int(row["image_size"])) == s.image
        assert row["image_crc32"] == zlib.crc32(s.image)
        assert json.loads(storage.read(entry.tar, int(row["json_offset"]), int(row["json_size"]))) == s.facts
        caption = storage.read(entry.tar, int(row["txt_offset"]), int(row["txt_size"])).decode()
        assert caption == (s.facts["captions"][0][0] if s.facts["captions"] else "")


def test_webdataset_reads_it(tmp_path):
    samples = [sample(i, f"caption {i} é") for i in range(12)]
    path, _ = written(tmp_path, samples)
    read = list(wds.WebDataset(str(path), shardshuffle=False))
    assert [row["__key__"] for row in read] == [s.key for s in samples]
    for row, s in zip(read, samples, strict=True):
        assert (int(row["cls"]), json.loads(row["json"])) == (s.label, s.facts)
        assert row["txt"].decode() == s.facts["captions"][0][0]
        assert np.array_equal(decode_png(row["png"]), decode_png(s.image))


def test_jpegs_are_named_so(tmp_path):
    entry = write_shard(tmp_path, "train", [sample(0)], "jpeg")
    with tarfile.open(tmp_path / Path(entry.tar).name) as tar:
        assert [Path(name).suffix for name in tar.getnames()] == [".cls", ".json", ".jpg", ".txt"]


def test_keys_that_break_webdataset_or_the_index_are_refused_and_nothing_is_left(tmp_path):
    for key in ("", "a.b", "a/b", "k" * 33, "é"):
        with pytest.raises(ValueError, match="neither"):
            write_shard(tmp_path, "train", [sample(0), sample(1)._replace(key=key)])
    with pytest.raises(ValueError, match="2 samples with 1 different keys"):
        write_shard(tmp_path, "train", [sample(0), sample(0)])
    with pytest.raises(ValueError, match="0 samples"):
        write_shard(tmp_path, "train", [])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_damage_is_found_and_named(tmp_path, damage):
    path, entry = written(tmp_path, [sample(i) for i in range(5)])
    storage = LocalFolder(tmp_path / "root")
    put_shard(storage, tmp_path, entry)
    assert not path.exists()

    def check_tar() -> None:
        check_shard(storage, entry, storage.path(entry.tar))

    for name, check in ((entry.tar, check_tar), (entry.index, lambda: read_index(storage, entry))):
        check()
        data = storage.read(name)
        middle = len(data) // 2
        if damage == "gone":
            if name == entry.tar:
                continue
            storage.remove(name)
        elif damage == "flip":
            storage.put(name, data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
        else:
            storage.put(name, data[:middle])
        with pytest.raises(ValueError, match=rf"{name}.*`diffusion shard`"):
            check()
        storage.put(name, data)
        check()
