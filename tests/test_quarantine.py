"""Quarantine: every file set aside is listed with its reason, its original is there to be had, the budget stops."""

import io
import json
import os
import tarfile
import time
from hashlib import sha256
from pathlib import Path

import pytest

from diffusion.data import quarantine
from diffusion.data.images import BadPicture
from diffusion.data.manifest import DUPLICATE, NEAR_DUPLICATE
from diffusion.data.quarantine import SetAside, entries, original, too_many, within_budget, write
from diffusion.store.storage import LocalFolder
from tests.test_manifest import MADE, published

FILES = [
    SetAside(name="a/1.png", kind="unreadable", detail="nothing"),
    SetAside(name="b/2.png", kind="truncated", detail="cut"),
    SetAside(name="c/2.png", kind="truncated", detail="cut, too"),
    SetAside(name="d/9.png", kind=DUPLICATE, detail="the same picture as a/0.png"),
    SetAside(name="e/9.png", kind=NEAR_DUPLICATE, detail="2 bits from a/0.png"),
]
DIGEST = MADE.digest
FOLDER = quarantine.place_of(DIGEST)


def read(place: str) -> bytes:
    if place == "a/1.png":
        raise BadPicture("unreadable", "gone")
    return place.encode() * 100


def written(folder: Path, files: list[SetAside] = FILES) -> LocalFolder:
    root = LocalFolder(folder / "root")
    published(folder / "root")
    (folder / "scratch").mkdir(parents=True)
    write(root, FOLDER, ((file, file.name) for file in files), read, folder / "scratch")
    assert list((folder / "scratch").iterdir()) == []
    return root


def test_reasons_and_originals(tmp_path):
    root = written(tmp_path)
    found = list(entries(root, DIGEST))
    assert [(f.name, f.kind, f.detail) for f in found] == [(f.name, f.kind, f.detail) for f in FILES]
    for file in found:
        if file.name in ("a/1.png", "d/9.png"):  # unreadable; a duplicate's picture is in the shards
            with pytest.raises(ValueError, match=f"{file.name}.*not kept"):
                original(root, file)
        else:
            data = read(file.name)
            assert original(root, file) == data
            assert (file.sha256, file.bytes) == (sha256(data).hexdigest(), len(data))


def test_the_tars_are_webdataset_and_the_same_at_any_time(tmp_path, monkeypatch):
    root = written(tmp_path / "now")
    name = f"{FOLDER}/quarantine-000000.tar"
    monkeypatch.setattr(time, "time", lambda: 2_000_000_000.0)
    old = os.umask(0o077)
    try:
        later = written(tmp_path / "later")
    finally:
        os.umask(old)
    assert later.read(name) == root.read(name)
    assert later.read(f"{FOLDER}/reasons.jsonl") == root.read(f"{FOLDER}/reasons.jsonl")
    with tarfile.open(fileobj=io.BytesIO(root.read(name))) as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}
    assert sorted(members) == [
        "000000.json",
        "000001.bin",
        "000001.json",
        "000002.bin",
        "000002.json",
        "000004.bin",
        "000004.json",
    ]
    assert members["000001.bin"] == read("b/2.png")
    assert json.loads(members["000000.json"])["kind"] == "unreadable"


def test_tars_and_their_sum_are_bounded_and_all_files_are_listed(tmp_path, monkeypatch):
    files = [SetAside(name=f"{i}.png", kind="damaged", detail="") for i in range(9)]
    size = len(read("0.png"))
    monkeypatch.setattr(quarantine, "MAX_TAR_BYTES", 5 * size)
    monkeypatch.setattr(quarantine, "MAX_ORIGINALS_BYTES", 6 * size)
    root = written(tmp_path, files)
    tars = [found.size for found in root.walk(f"{FOLDER}/quarantine-")]
    assert len(tars) > 1
    found = list(entries(root, DIGEST))
    assert [file.name for file in found] == [file.name for file in files]
    assert [original(root, file) for file in found[:6]] == [read(file.name) for file in files[:6]]
    for file in found[6:]:
        with pytest.raises(ValueError, match=r"listed, but not kept: kept are"):
            original(root, file)


def test_one_original_larger_than_a_tar_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(quarantine, "MAX_TAR_BYTES", 10)
    root = written(tmp_path)
    assert [original(root, file) for file in entries(root, DIGEST) if file.tar] == [
        read(f) for f in ("b/2.png", "c/2.png", "e/9.png")
    ]


def test_long_and_odd_names_are_kept_over_many_reads(tmp_path, monkeypatch):
    monkeypatch.setattr(quarantine, "_BLOCK", 7)
    names = sorted(["x/" + "ü" * 120 + ".png", "x/a\nb.png", "x/\u2028.png"])
    root = written(tmp_path, [SetAside(name=name, kind="empty", detail="") for name in names])
    assert [file.name for file in entries(root, DIGEST)] == names
    assert [original(root, file) for file in entries(root, DIGEST)] == [read(name) for name in names]


@pytest.mark.parametrize(("damage", "says"), [(b'{"name": 3}\n', "name: it is no text"), (b'{"na', "it is cut off")])
def test_a_damaged_list_is_named(tmp_path, damage, says):
    root = written(tmp_path)
    place = root.path(f"{FOLDER}/{quarantine.REASONS}")
    lines = place.read_bytes()
    place.unlink()
    place.write_bytes(lines + damage)
    with pytest.raises(ValueError, match=rf"reasons.jsonl, which .* is damaged \({says}\): .* --fresh"):
        list(entries(root, DIGEST))


def test_a_dataset_without_a_list_is_named(tmp_path):
    root = LocalFolder(tmp_path)
    with pytest.raises(ValueError, match="holds no dataset"):
        list(entries(root, DIGEST))
    published(tmp_path)
    with pytest.raises(ValueError, match=r"reasons.jsonl is missing.*--fresh"):
        list(entries(root, DIGEST))


def test_the_budget_counts_damage_but_not_duplicates():
    counts = {DUPLICATE: 5, "empty": 1, NEAR_DUPLICATE: 7, "truncated": 2}
    assert within_budget(counts, 30, 0.1)  # three damaged of 30
    assert not within_budget(counts, 29, 0.1)
    message = str(too_many(counts, 29, 0.1, FILES[:2], "s3://b/quarantine/x"))
    assert "3 of 29 files cannot be used (1 empty, 2 truncated)" in message
    assert "a/1.png: unreadable (nothing)" in message
    assert "s3://b/quarantine/x" in message
    assert "--set shard.max_rejected=0.11" in message
    assert within_budget(counts, 29, 0.11)  # what it says to type is enough
    for total in (3 * 10**5 + 1, 1001):
        bad = {"empty": total - 1}
        assert within_budget(bad, total, float(str(too_many(bad, total, 0.1, [], "x")).rpartition("=")[2].strip("`")))
    nothing = str(too_many({"empty": 1, "too small": 2}, 3, 0.1, [], "x"))
    assert "too small is so by the recipe: shard.min_side, shard.max_aspect" in nothing
    assert "Nothing would be left" in nothing
    assert "max_rejected=" not in nothing
