"""Random access: the pictures that were written, from any storage; damage found, named, repaired or stood in for."""

import os
import shutil
import threading
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion.data import manifest, open_shards, reader
from diffusion.data.damage import TooMuchDamage
from diffusion.data.pictures.decode import decode_into
from diffusion.data.reader import Sample, ShardReader
from diffusion.data.shards import read_index
from diffusion.store.refs import DatasetRef
from diffusion.store.storage import LocalFolder, StorageUnavailable
from tests.dataset_of import publish, sample

SIDE = 8
SIZES = (5, 1, 7, 4)  # pictures of each shard
WORDS = ((), (("a fox", 1.0),), (("é, a red fox", 3.0), ("a fox", 1.0), ("", 0.5)))
SAMPLES = [sample(i, SIDE, WORDS[i % 3]) for i in range(sum(SIZES))]
FIRST = [sum(SIZES[:i]) for i in range(len(SIZES) + 1)]
SHARDS = [SAMPLES[first:last] for first, last in pairwise(FIRST)]


@pytest.fixture
def dataset(tmp_path) -> DatasetRef:
    folder = tmp_path / "work"
    folder.mkdir()
    return publish(LocalFolder(tmp_path / "root"), folder, SHARDS, SIDE)


def expected(i: int) -> Sample:
    pixels = np.empty((SIDE, SIDE, 3), np.uint8)
    decode_into(SAMPLES[i].image, pixels)
    return Sample(SAMPLES[i].key, pixels, SAMPLES[i].label, WORDS[i % 3])


def agrees(read: Sample, i: int) -> bool:
    wanted = expected(i)
    return np.array_equal(read.image, wanted.image) and (read.key, read.label, read.captions) == (
        wanted.key,
        wanted.label,
        wanted.captions,
    )


def tar_of(dataset: DatasetRef, shard: int) -> Path:
    return LocalFolder(Path(dataset.uri).parent.parent).path(manifest.load(dataset.uri).shards[shard].tar)


def flip(dataset: DatasetRef, i: int) -> None:
    """Change one bit of picture i."""
    shard = next(number for number in range(len(SIZES)) if i < FIRST[number + 1])
    row = read_index(LocalFolder(Path(dataset.uri).parent.parent), manifest.load(dataset.uri).shards[shard])[
        i - FIRST[shard]
    ]
    path = tar_of(dataset, shard)
    data = bytearray(path.read_bytes())
    data[int(row["image_offset"]) + int(row["image_size"]) // 2] ^= 4
    path.write_bytes(data)


@given(asked=st.lists(st.integers(0, sum(SIZES) - 1), max_size=30), cache_mib=st.sampled_from([0, 1]))
@settings(max_examples=60, deadline=None)
def test_any_pictures_in_any_order_are_those_that_were_written(written_once, asked, cache_mib):
    pictures = written_once[cache_mib].gather(np.array(asked, np.int64))
    assert (pictures.images.shape, pictures.label.shape) == ((len(asked), SIDE, SIDE, 3), (len(asked),))
    for place, i in enumerate(asked):
        read = Sample(pictures.keys[place], pictures.images[place], pictures.label[place], pictures.captions[place])
        assert agrees(read, i)
    assert pictures.texts == [WORDS[i % 3][0][0] if i % 3 else "" for i in asked]


@pytest.fixture(scope="module")
def written_once(tmp_path_factory) -> dict[int, ShardReader]:
    root = tmp_path_factory.mktemp("root")
    ref = publish(LocalFolder(root), root, SHARDS, SIDE)
    return {mib: ShardReader(ref.uri, cache_mib=mib) for mib in (0, 1)}


def test_columns_of_all_pictures(dataset):
    opened = ShardReader(dataset.uri)
    assert opened.keys == [row.key for row in SAMPLES]
    assert opened.labels.tolist() == [row.label for row in SAMPLES]
    assert (opened.labels.dtype, len(opened), opened.counts) == (np.int64, len(SAMPLES), SIZES)
    with pytest.raises(IndexError):
        opened.read(len(SAMPLES))


def test_captions_that_are_not_asked_for_are_not_read(dataset):
    flips = tar_of(dataset, 0).read_bytes().replace(b"red fox", b"red fo\xff")
    tar_of(dataset, 0).write_bytes(flips)
    assert ShardReader(dataset.uri, captions=False).read(2).captions == ()
    with pytest.raises(TooMuchDamage, match="captions cannot be read"):
        ShardReader(dataset.uri).read(2)


class Asked(LocalFolder):
    """A folder that is reached as a bucket is: every request is noted, some are refused."""

    def __init__(self, folder: Path, refused: int = 0) -> None:
        super().__init__(folder)
        self.asked: list[str] = []
        self.refused = refused

    def read(self, name: str, start: int = 0, size: int | None = None) -> bytes:
        self.asked.append(name)
        if self.refused and name.endswith(".tar"):
            self.refused -= 1
            raise StorageUnavailable(f"{name}: 503 SlowDown, asked 8 times")
        return super().read(name, start, size)


def test_opening_reads_the_manifest_and_the_first_picture_one_index(dataset, monkeypatch):
    storage = Asked(Path(dataset.uri).parent.parent)
    monkeypatch.setattr("diffusion.data.manifest.root_of", lambda uri: storage)
    opened = ShardReader(dataset.uri)
    assert storage.asked == []
    opened.read(6)
    opened.read(7)
    assert storage.asked == [opened.entries[2].index]


def test_arrays_are_the_callers_to_change(dataset):
    opened = ShardReader(dataset.uri)
    for _ in range(2):
        pictures = opened.gather(np.array([0, 3]))
        assert agrees(Sample(pictures.keys[1], pictures.images[1], pictures.label[1], pictures.captions[1]), 3)
        pictures.images[:] = 0
        pictures.label[:] = -1
    opened.read(0).image[:] = 0
    assert agrees(opened.read(0), 0)


def test_the_cache_of_pictures_stays_within_its_bound_and_serves_without_the_disk(tmp_path):
    side = 256  # five in a MiB
    samples = [sample(i, side, WORDS[1]) for i in range(9)]
    ref = publish(LocalFolder(tmp_path), tmp_path, [samples], side)
    cached, none = ShardReader(ref.uri, cache_mib=1), ShardReader(ref.uri, cache_mib=0)
    assert 0 < cached._pictures.nbytes <= 2**20
    everything = np.arange(len(samples))[::-1].copy()
    for _ in range(2):
        ours, theirs = cached.gather(everything), none.gather(everything)
        assert np.array_equal(ours.images, theirs.images)
        assert (ours.captions, ours.keys) == (theirs.captions, theirs.keys)
    os.truncate(tar_of(ref, 0), 0)
    assert np.array_equal(cached.read(4).image, ours.images[4])
    for opened, picture in ((none, 4), (cached, 5)):
        with pytest.raises(TooMuchDamage, match="0 of"):
            opened.read(picture)


def test_few_shards_are_open_at_a_time_and_closed_when_nobody_reads_from_them(dataset, monkeypatch):
    folder = str(tar_of(dataset, 0).parent.parent)

    def files() -> int:
        return sum(os.path.realpath(entry.path).startswith(folder) for entry in os.scandir("/proc/self/fd"))

    monkeypatch.setattr(open_shards, "OPEN_SHARDS", 2)
    opened = ShardReader(dataset.uri, cache_mib=0)
    for _ in range(3):
        opened.gather(np.arange(len(opened)))
        assert files() == 2
    monkeypatch.setattr(open_shards, "INDEX_BYTES", 1)
    opened.gather(np.arange(len(opened)))
    assert files() == 1
    del opened
    assert files() == 0


def test_threads_agree_while_shards_are_opened_and_closed_under_them(dataset, monkeypatch):
    monkeypatch.setattr(open_shards, "OPEN_SHARDS", 1)
    opened = ShardReader(dataset.uri, cache_mib=0)
    wanted = opened.gather(np.arange(len(opened))).images
    same: list[bool] = []

    def work(seed: int) -> None:
        asked = np.random.default_rng(seed).integers(0, len(opened), 300)
        same.append(np.array_equal(opened.gather(asked).images, wanted[asked]))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert same == [True] * 4


# damage


@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_damage_is_named_with_shard_key_and_command(dataset, damage):
    path = tar_of(dataset, 2)
    if damage == "flip":
        flip(dataset, 12)
    elif damage == "cut":
        os.truncate(path, 2_000)
    else:
        path.unlink()
    opened = ShardReader(dataset.uri)
    assert agrees(opened.read(4), 4)
    key = "" if damage == "gone" else f"key {SAMPLES[12].key} .*"
    with pytest.raises(TooMuchDamage, match=rf"{path.name} .*{key}`diffusion shard`"):
        opened.read(12)


@pytest.mark.parametrize("captions", [False, True])
def test_a_picture_in_anothers_place_is_damage_though_it_decodes(tmp_path, captions):
    first = sample(0, SIDE)
    other = next(row for row in (sample(i, SIDE) for i in range(1, 1_000)) if len(row.image) == len(first.image))
    ref = publish(LocalFolder(tmp_path), tmp_path, [[first, sample(1_000, SIDE)]], SIDE)
    path = tar_of(ref, 0)
    path.write_bytes(path.read_bytes().replace(first.image, other.image))
    opened = ShardReader(ref.uri, captions=captions, max_damaged=0.5)
    for _ in range(2):
        assert opened.gather(np.arange(2)).keys == [sample(1_000, SIDE).key] * 2
    assert [damage.key for damage in opened.damage.news] == [first.key]


@pytest.mark.parametrize("damage", ["flip", "gone"])
def test_a_damaged_index_loses_its_shard_alone(dataset, damage):
    path = tar_of(dataset, 2).with_suffix(".npy")
    if damage == "flip":
        path.write_bytes(path.read_bytes()[:-1] + b"\1")
    else:
        path.unlink()
    opened = ShardReader(dataset.uri)
    assert agrees(opened.read(4), 4)
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"{path.name} .*`diffusion shard`"):
            opened.read(12)
    with pytest.raises(ValueError, match=path.name):
        _ = opened.labels


@given(
    bad=st.sets(st.integers(0, sum(SIZES) - 1), max_size=sum(SIZES) - 1), lost=st.sets(st.integers(0, 3), max_size=2)
)
@settings(max_examples=40, deadline=None)
def test_the_next_good_picture_stands_in(tmp_path_factory, written_once, bad, lost):
    """Against a plain search, whatever is asked for first and however often."""
    folder = tmp_path_factory.mktemp("root")
    shutil.copytree(written_once[0].root.uri, folder, dirs_exist_ok=True)
    ref = written_once[0].manifest.ref(str(folder / manifest.place_of(written_once[0].manifest.digest)))
    for i in bad:
        flip(ref, i)
    for number in lost:
        tar_of(ref, number).unlink()
    good = [i for i in range(len(SAMPLES)) if i not in bad and not any(i in range(*FIRST[n : n + 2]) for n in lost)]
    if not good:
        return

    def stands_in(i: int) -> int:
        own = next(number for number in range(len(SIZES)) if i < FIRST[number + 1])
        for number in [*range(own, len(SIZES)), *range(own)]:
            start = (i - FIRST[own]) % SIZES[number]
            for j in [*range(start, SIZES[number]), *range(start)]:
                if FIRST[number] + j in good:
                    return FIRST[number] + j
        raise AssertionError

    opened = ShardReader(ref.uri, max_damaged=0.999, cache_mib=0)
    opened.damage.allowed = len(SAMPLES)
    asked = np.random.default_rng(len(bad)).integers(0, len(SAMPLES), 60)
    for _ in range(2):
        pictures = opened.gather(asked)
        for place, i in enumerate(asked.tolist()):
            read = Sample(pictures.keys[place], pictures.images[place], pictures.label[place], pictures.captions[place])
            assert agrees(read, stands_in(i))
    met = [(entry.shard, entry.key) for entry in opened.damage.news]
    assert len(set(met)) == len(met)
    assert opened.damage.count == sum(entry.pictures for entry in opened.damage.news) <= len(SAMPLES) - len(good)


def test_over_the_budget_a_run_stops(tmp_path):
    samples = [sample(i, SIDE) for i in range(3_000)]
    shards = [samples[start : start + 1_000] for start in (0, 1_000, 2_000)]
    ref = publish(LocalFolder(tmp_path), tmp_path, shards, SIDE)
    opened = ShardReader(ref.uri, max_damaged=0.001, captions=False)
    assert opened.damage.allowed == 3
    os.truncate(tar_of(ref, 0), manifest.load(ref.uri).shards[0].bytes // 2)
    assert opened.gather(np.array([999, 997, 0, 999])).keys == [samples[i].key for i in (0, 0, 0, 0)]
    assert (opened.damage.count, [entry.key for entry in opened.damage.news]) == (
        3,
        [samples[i].key for i in (999, 997, 998)],
    )
    with pytest.raises(TooMuchDamage, match=rf"4 of 3,000 pictures are damaged, and 3 .* key {samples[996].key}"):
        opened.read(996)


@pytest.mark.parametrize(("pictures", "share", "allowed"), [(10, 0.001, 1), (10**6, 0.001, 1_000), (10**6, 0.0, 0)])
def test_what_is_allowed(pictures, share, allowed):
    assert reader.DamageLog(pictures, share).allowed == allowed


def test_a_share_that_is_none_is_refused(dataset):
    with pytest.raises(ValueError, match="max_damaged=1"):
        ShardReader(dataset.uri, max_damaged=1.0)


def test_a_storage_that_does_not_answer_is_no_damage(dataset, monkeypatch):
    storage = Asked(Path(dataset.uri).parent.parent, refused=1)
    bucket = Bucket(storage)
    monkeypatch.setattr("diffusion.data.manifest.root_of", lambda uri: bucket)
    opened = ShardReader(dataset.uri, max_damaged=0.5)
    with pytest.raises(StorageUnavailable):
        opened.read(3)
    assert agrees(opened.read(3), 3)
    assert opened.damage.count == 0


class Bucket:
    """A storage that is no local folder."""

    def __init__(self, inner: LocalFolder, delay_s: float = 0.0) -> None:
        self.inner, self.uri, self.delay_s = inner, inner.uri, delay_s
        self.fetched: list[str] = []

    def read(self, name: str, start: int = 0, size: int | None = None) -> bytes:
        return self.inner.read(name, start, size)

    def fetch(self, name: str, target: Path) -> None:
        time.sleep(self.delay_s)
        self.fetched.append(name)
        self.inner.fetch(name, target)


def test_without_local_copies_a_picture_is_a_request(dataset, monkeypatch):
    storage = Asked(Path(dataset.uri).parent.parent)
    monkeypatch.setattr("diffusion.data.manifest.root_of", lambda uri: Bucket(storage))
    opened = ShardReader(dataset.uri)
    assert agrees(opened.read(7), 7)
    assert agrees(opened.read(8), 8)
    assert storage.asked == [opened.entries[2].index, opened.entries[2].tar, opened.entries[2].tar]
