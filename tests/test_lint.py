"""Every kind of damage is found and named; what is whole passes."""

import hashlib
import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest

from diffusion.data.datasets import Dataset
from diffusion.data.lint import Finding, lint
from diffusion.data.manifest import ShardEntry
from diffusion.store.storage import LocalFolder
from tests.made_dataset import SIDE, Made, published

PICTURES = [
    Made(n, "cats" if n % 3 else "dogs", "holdout" if n > 9 else "train", ("one", "two")[: n % 3]) for n in range(14)
]


@pytest.fixture
def root(tmp_path: Path) -> LocalFolder:
    return LocalFolder(tmp_path)


def test_a_whole_dataset_passes_and_every_picture_is_counted(root: LocalFolder) -> None:
    seen = []
    assert lint(published(root, PICTURES), progress=lambda done, total: seen.append((done, total))) == []
    assert seen == [(4, 14), (8, 14), (10, 14), (14, 14)]


def members(root: LocalFolder, entry: ShardEntry) -> dict[str, bytes]:
    with tarfile.open(root.path(entry.tar)) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def rewritten(root: LocalFolder, made: Dataset, number: int, data: dict[str, bytes]) -> Dataset:
    """The dataset with other members in a shard, whose manifest and index are in accord with its bytes."""
    entry = made.manifest.shards[number]
    index = np.load(root.path(entry.index))
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in data.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    with tarfile.open(fileobj=io.BytesIO(out.getvalue())) as tar:
        for member in tar:
            key, _, kind = member.name.partition(".")
            if (kind := kind.replace("png", "image")) != "cls" and key.encode() in index["key"]:
                row = np.flatnonzero(index["key"] == key.encode())[0]
                index[f"{kind}_offset"][row], index[f"{kind}_size"][row] = member.offset_data, member.size
    return stored(root, made, number, out.getvalue(), index)


def stored(root: LocalFolder, made: Dataset, number: int, tar: bytes, index: np.ndarray) -> Dataset:
    saved = io.BytesIO()
    np.save(saved, index)
    sums = {"sha256": hashlib.sha256(tar).hexdigest(), "index_sha256": hashlib.sha256(saved.getvalue()).hexdigest()}
    entry = made.manifest.shards[number].model_copy(update=sums | {"bytes": len(tar)})
    root.put(entry.tar, tar)
    root.put(entry.index, saved.getvalue())
    shards = [entry if n == number else other for n, other in enumerate(made.manifest.shards)]
    return Dataset(made.uri, made.manifest.model_copy(update={"shards": tuple(shards)}))


def test_a_changed_byte_is_found_wherever_it_is(root: LocalFolder) -> None:
    made = published(root, PICTURES)
    entry = made.manifest.shards[1]
    whole = root.read(entry.tar)
    for place in range(0, len(whole), 997):
        root.put(entry.tar, whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert Finding(
            entry.tar,
            "",
            f"has sha256 {hashlib.sha256(root.read(entry.tar)).hexdigest()[:12]}, as its name does not say",
        ) in lint(made)
    root.put(entry.tar, whole[:-1024])
    assert any(found.place == entry.tar and "bytes instead of" in found.what for found in lint(made))


def test_what_is_missing_is_named_once(root: LocalFolder) -> None:
    made = published(root, PICTURES)
    first, second = made.manifest.shards[:2]
    root.remove(first.tar)
    root.remove(second.index)
    assert lint(made) == [Finding(first.tar, "", "is missing"), Finding(second.index, "", "is missing")]
    for place in (first.tar, second.index):
        os.mkfifo(root.path(place))  # nobody writes into it
    assert lint(made) == [Finding(first.tar, "", "is missing"), Finding(second.index, "", "is missing")]
    root.path(first.tar).unlink()
    root.put(first.tar, b"no tar" * 1000)
    assert any("is no tar that can be read" in found.what for found in lint(made))


def test_a_changed_index_is_found(root: LocalFolder) -> None:
    made = published(root, PICTURES)
    entry = made.manifest.shards[0]
    root.put(entry.index, root.read(entry.index)[:-1] + b"x")
    assert lint(made) == [Finding(entry.index, "", "differs from the manifest's sha256")]


def changed_json(data: bytes, **change: object) -> bytes:
    return json.dumps({**json.loads(data), **change}).encode()


@pytest.mark.parametrize(
    ("member", "change", "says"),
    [
        ("cls", lambda data: b"7", "cls says b'7', the index"),
        ("json", lambda data: b"{", "its json cannot be used"),
        ("json", lambda data: changed_json(data, content_sha256="0" * 64), "as its key does not say"),
        ("json", lambda data: changed_json(data, label="birds"), "by its index and 'birds' by its json"),
        ("json", lambda data: changed_json(data, captions=[["x", 1]] * 9), "captions differ"),
        ("txt", lambda data: b"other", "captions differ"),
        ("png", lambda data: data[:-20], "the picture differs from the index's checksum"),
        ("png", lambda data: data[:60] + data[61:], "the picture cannot be read"),
    ],
)
def test_a_sample_that_contradicts_itself_is_named(member: str, change, says: str, root: LocalFolder) -> None:
    made = published(root, PICTURES)
    data = members(root, made.manifest.shards[2])
    name = next(name for name in data if name.endswith(member))
    damaged = rewritten(root, made, 2, data | {name: change(data[name])})
    found = lint(damaged)
    assert {(place, key) for place, key, _ in found} == {(damaged.manifest.shards[2].tar, name.partition(".")[0])}
    assert any(says in what for *_, what in found)


def test_members_that_are_missing_or_misplaced_are_named(root: LocalFolder) -> None:
    made = published(root, PICTURES)
    data = members(root, made.manifest.shards[0])
    names = list(data)
    assert any(
        "has the members cls, json, png, not" in f.what
        for f in lint(rewritten(root, made, 0, {n: data[n] for n in names[:3] + names[4:]}))
    )
    assert any(
        "stands where the index has" in f.what
        for f in lint(rewritten(root, made, 0, {n: data[n] for n in names[4:] + names[:4]}))
    )
    found = lint(rewritten(root, made, 0, {n: data[n] for n in names[:-4]}))
    assert [f.what for f in found if f.key == ""] == ["has 3 samples, its index 4, the manifest says 4"]
    tar = made.manifest.shards[0].tar
    index = np.load(root.path(made.manifest.shards[0].index))
    index["image_offset"][1] += 512
    assert any("image lies elsewhere" in f.what for f in lint(stored(root, made, 0, root.read(tar), index)))
    index = np.load(root.path(made.manifest.shards[0].index))
    index["label"][2] = 2
    assert any("label 2 is none of 2 classes" in f.what for f in lint(stored(root, made, 0, root.read(tar), index)))


def test_a_picture_of_another_size_is_named(root: LocalFolder) -> None:
    made = published(root, PICTURES, resolution=SIDE * 2)
    found = lint(made)
    assert len(found) == len(PICTURES)
    assert all(f"of {SIDE} x {SIDE} pixels" in what for *_, what in found)


def test_a_picture_that_is_there_twice_is_named(root: LocalFolder) -> None:
    held = Made(1, split="holdout")
    found = lint(published(root, [Made(1), Made(2), Made(3), held], shard_size=2))
    assert [(key, "train and holdout" in what) for _, key, what in found] == [(held.key, True)]


def test_counts_that_the_manifest_has_wrong_are_named(root: LocalFolder) -> None:
    made = published(root, PICTURES)
    train = made.manifest.train_counts
    lying = Dataset(made.uri, made.manifest.model_copy(update={"train_counts": (train[0] + 1, train[1] - 1)}))
    assert [what for *_, what in lint(lying)] == [
        f"class 'cats' has {train[0]} pictures in split train, the manifest says {train[0] + 1}",
        f"class 'dogs' has {train[1]} pictures in split train, the manifest says {train[1] - 1}",
    ]
