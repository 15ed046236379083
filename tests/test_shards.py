"""Shards: the same bytes, readable by the world, every offset right, damage named."""

import json
import os
import tarfile
import time

import numpy as np
import pytest
import webdataset as wds
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion.data.images import decode_png, encode_png
from diffusion.data.shards import MEMBERS, PackedSample, check_shard, read_index, write_shard


def sample(i: int, caption: str = "") -> PackedSample:
    image = np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return PackedSample(f"{i:08x}", i % 3, {"source": f"é/{i}.png", "caption": caption}, encode_png(image), caption)


def test_equal_samples_give_equal_bytes_at_any_time(tmp_path, monkeypatch):
    samples = [sample(i, "a fox") for i in range(20)]
    (tmp_path / "later").mkdir()
    first = write_shard(tmp_path / "train-000000.tar", "train", samples)
    monkeypatch.setattr(time, "time", lambda: 2_000_000_000.0)
    old = os.umask(0o077)
    try:
        second = write_shard(tmp_path / "later" / "train-000000.tar", "train", iter(samples))
    finally:
        os.umask(old)
    assert first == second
    for name in (first.name, first.index):
        assert (tmp_path / name).read_bytes() == (tmp_path / "later" / name).read_bytes()


def test_members_have_fixed_owner_mode_time_and_order(tmp_path):
    write_shard(tmp_path / "s.tar", "train", [sample(0), sample(1)])
    with tarfile.open(tmp_path / "s.tar") as tar:
        members = tar.getmembers()
    assert [member.name for member in members] == [f"{i:08x}.{ext}" for i in (0, 1) for ext in MEMBERS]
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o444)}


@given(st.lists(st.tuples(st.text(max_size=600), st.integers(0, 1400)), min_size=1, max_size=6))
@settings(max_examples=40, deadline=None)
def test_index_points_at_every_member(tmp_path_factory, contents):
    folder = tmp_path_factory.mktemp("shard")
    captions = [text.encode("utf-8", "replace").decode() for text, _ in contents]
    samples = [
        PackedSample(f"{i:08x}", i, {"n": i}, b"p" * size, caption)
        for i, (caption, (_, size)) in enumerate(zip(captions, contents, strict=True))
    ]
    entry = write_shard(folder / "train-000000.tar", "train", samples)
    index = read_index(folder, entry)
    data = (folder / entry.name).read_bytes()
    with tarfile.open(folder / entry.name) as tar:
        for member in MEMBERS:
            for key, (offset, size) in zip(index.keys, index.spans[member], strict=True):
                assert data[offset : offset + size] == tar.extractfile(f"{key}.{member}").read()
    assert (entry.pictures, entry.bytes, index.labels) == (len(samples), len(data), list(range(len(samples))))


def test_webdataset_reads_it(tmp_path):
    samples = [sample(i, f"caption {i} é") for i in range(12)]
    write_shard(tmp_path / "train-000000.tar", "train", samples)
    read = list(wds.WebDataset(str(tmp_path / "train-000000.tar"), shardshuffle=False))
    assert [row["__key__"] for row in read] == [s.key for s in samples]
    for row, s in zip(read, samples, strict=True):
        assert (int(row["cls"]), row["txt"].decode(), json.loads(row["json"])) == (s.label, s.caption, s.facts)
        assert np.array_equal(decode_png(row["png"]), decode_png(s.png))


def test_keys_that_break_webdataset_are_refused(tmp_path):
    for key in ("", "a.b", "a/b"):
        with pytest.raises(ValueError, match="neither"):
            write_shard(tmp_path / "s.tar", "train", [sample(0)._replace(key=key)])
    with pytest.raises(ValueError, match="2 samples, 1 different keys"):
        write_shard(tmp_path / "s.tar", "train", [sample(0), sample(0)])
    with pytest.raises(ValueError, match="0 samples"):
        write_shard(tmp_path / "s.tar", "train", [])


@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_damage_is_found_and_named(tmp_path, damage):
    entry = write_shard(tmp_path / "train-000000.tar", "train", [sample(i) for i in range(5)])
    check_shard(tmp_path, entry)
    for name, check in ((entry.name, check_shard), (entry.index, read_index)):
        path = tmp_path / name
        data = path.read_bytes()
        if damage == "gone":
            path.unlink()
        else:
            middle = len(data) // 2
            path.write_bytes(
                data[:middle] + (bytes([data[middle] ^ 1]) + data[middle + 1 :] if damage == "flip" else b"")
            )
        with pytest.raises(ValueError, match=rf"{name}.*`diffusion shard`"):
            check(tmp_path, entry)
        path.write_bytes(data)
        check(tmp_path, entry)
