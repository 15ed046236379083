"""Batches: what a position holds depends on nothing else; damage is named; threads end."""

import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion.data import stream
from diffusion.data.order import Order
from diffusion.data.reader import ShardReader
from diffusion.data.stream import batches, drawn
from diffusion.store.cache import ShardCache
from diffusion.store.refs import DatasetRef
from diffusion.store.storage import LocalFolder
from tests.dataset_of import publish, sample

SIDE = 32
WORDS = ((), (("a fox", 1.0),), (("red", 3.0), ("green", 1.0), ("never", 0.0)))
SAMPLES = [sample(i, SIDE, WORDS[i % 3]) for i in range(47)]
SHARDS = [SAMPLES[start : start + 16] for start in range(0, 47, 16)]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> DatasetRef:
    root = tmp_path_factory.mktemp("root")
    return publish(LocalFolder(root), root, SHARDS, SIDE)


def order_of(reader: ShardReader) -> Order:
    return Order(len(reader), 16, seed=3, window=8, streams=4)


def joined(parts) -> dict:
    parts = list(parts)
    return {
        "images": torch.cat([part.images for part in parts]),
        "label": torch.cat([part.label for part in parts]),
        "index": torch.cat([part.index for part in parts]),
        "captions": [caption for part in parts for caption in part.captions],
        "keys": [key for part in parts for key in part.keys],
    }


def equal(a: dict, b: dict) -> bool:
    return all(torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a)


def read_ahead_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


def test_a_batch_holds_the_order_s_pictures(dataset):
    reader = ShardReader(dataset.uri, digest=dataset.digest)
    order = order_of(reader)
    batch = next(batches(reader, order, 10, start=25))
    assert (batch.images.shape, batch.images.dtype) == ((10, 3, 32, 32), torch.uint8)
    assert (batch.label.dtype, batch.index.dtype) == (torch.int64, torch.int64)
    assert batch.index.tolist() == list(range(25, 35))
    assert batch.images.is_contiguous(memory_format=torch.channels_last)  # as decoded, without a copy
    for place, i in enumerate(order.at(25, 10).tolist()):
        sample = reader.read(i)
        assert np.array_equal(batch.images[place].permute(1, 2, 0).numpy(), sample.image)
        assert (batch.keys[place], batch.label[place]) == (sample.key, sample.label)
        assert batch.captions[place] in ([text for text, _ in sample.captions] or [""])


def test_the_stream_is_the_same_for_any_batch_size_threads_cache_and_resume(dataset):
    reader = ShardReader(dataset.uri)
    stop = 3 * len(reader) + 7
    whole = joined(batches(reader, order_of(reader), 8, stop=stop, threads=0))
    assert whole["index"].tolist() == list(range(stop))
    for size, threads, cache_mib in ((1, 1, 1), (8, 3, 0), (32, 2, 1), (1000, 2, 1)):
        other = ShardReader(dataset.uri, cache_mib=cache_mib)
        assert equal(joined(batches(other, order_of(other), size, stop=stop, threads=threads)), whole)
    resumed = joined(batches(reader, order_of(reader), 8, start=53, stop=stop))
    assert equal(resumed, {key: value[53:] for key, value in whole.items()})


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_share_the_global_batches(dataset, world):
    reader = ShardReader(dataset.uri)
    order = order_of(reader)
    whole = list(batches(reader, order, 8, stop=64))
    ranks = [list(batches(reader, order, 8, stop=64, rank=rank, world=world)) for rank in range(world)]
    for step, batch in enumerate(whole):
        assert equal(joined(rank[step] for rank in ranks), joined([batch]))


def test_threads_end_when_the_stream_ends_or_is_closed_or_forgotten(dataset):
    reader = ShardReader(dataset.uri)
    order = order_of(reader)
    list(batches(reader, order, 8, stop=32))
    assert read_ahead_threads() == []
    share = batches(reader, order, 8)
    next(share)
    assert read_ahead_threads()
    share.close()
    assert read_ahead_threads() == []
    share = batches(reader, order, 8)
    next(share)
    del share
    assert read_ahead_threads() == []


def test_read_ahead_is_bounded(dataset):
    class Counting(Order):
        calls = []

        def at(self, start, count):
            self.calls.append(start)
            return super().at(start, count)

    reader = ShardReader(dataset.uri)
    share = batches(reader, Counting(len(reader), 16, 3, 8, 4), 8, threads=2, ahead=3)
    next(share)
    time.sleep(0.3)  # long enough for threads to run away if they could
    assert len(Counting.calls) <= 3
    share.close()


def test_wrong_arguments_are_refused_at_once(dataset):
    reader = ShardReader(dataset.uri)
    order = order_of(reader)
    with pytest.raises(ValueError, match="8 pictures cannot be divided among 3 workers"):
        batches(reader, order, 8, world=3)
    with pytest.raises(ValueError, match="3 pictures cannot be divided among 2 workers"):
        batches(reader, order, 8, stop=19, world=2)
    with pytest.raises(ValueError, match="positions start at 0"):
        batches(reader, order, 8, start=-1)
    with pytest.raises(ValueError, match="the order is over 5 pictures"):
        batches(reader, Order(5, 5, 0, 1, 1), 8)
    with pytest.raises(ValueError, match="rank=2"):
        batches(reader, order, 8, rank=2, world=2)
    with pytest.raises(IndexError):
        reader.read(len(reader))


def test_of_several_captions_each_position_shows_one_by_weight():
    words = [WORDS[i % 3] for i in range(30_000)]
    index = torch.arange(len(words))
    texts = drawn(words, index, seed=5)
    shown = Counter(texts[2::3])
    assert set(texts[::3]) == {""}
    assert set(texts[1::3]) == {"a fox"}
    assert set(shown) == {"red", "green"}  # a weight of 0 is never drawn
    # 10,000 draws at 3 to 1: standard deviation 43
    assert abs(shown["red"] - 7_500) < 5 * 43
    part = torch.randperm(len(words))[:500]
    assert drawn([words[i] for i in part.tolist()], part, seed=5) == [texts[i] for i in part.tolist()]
    assert drawn(words, index, seed=6) != texts
    assert drawn([(("a", 0.0), ("b", 0.0))], index[:1], seed=5) == ["a"]


def test_damage_is_told_once_by_the_caller_s_thread_and_stood_in_for(dataset, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(Path(dataset.uri).parent.parent, copy)
    uri = copy / "datasets" / Path(dataset.uri).name
    tar = copy / ShardReader(uri).entries[1].tar
    data = tar.read_bytes()
    tar.write_bytes(data.replace(SAMPLES[20].image, SAMPLES[20].image[:-40] + bytes(40)))
    strict = ShardReader(uri)
    with pytest.raises(ValueError, match=rf"{tar.name}.*{SAMPLES[20].key}"):
        list(batches(strict, order_of(strict), 4, stop=len(strict)))
    assert read_ahead_threads() == []
    told: list[tuple] = []
    streams = []
    for threads in (0, 1, 3):
        opened = ShardReader(uri, max_damaged=0.001)
        stop = 2 * len(opened)
        part = batches(
            opened,
            order_of(opened),
            4,
            stop=stop,
            threads=threads,
            on_damage=lambda damage: told.append((damage.key, threading.current_thread())),
        )
        streams.append(joined(part))
    assert told == [(SAMPLES[20].key, threading.main_thread())] * 3
    assert all(equal(streams[0], stream) for stream in streams)
    sound = joined(batches(ShardReader(dataset.uri), order_of(opened), 4, stop=stop))
    for place, key in enumerate(sound["keys"]):
        instead = SAMPLES[21].key if key == SAMPLES[20].key else key
        assert streams[0]["keys"][place] == instead


class Bucket:
    """A root that is not a local folder; it notes what is fetched."""

    def __init__(self, inner: LocalFolder) -> None:
        self.inner, self.uri = inner, inner.uri
        self.fetched: list[str] = []
        self.pieces = False

    def read(self, name: str, start: int = 0, size: int | None = None) -> bytes:
        assert self.pieces or name.endswith(".npy"), "pictures come from the local copies"
        return self.inner.read(name, start, size)

    def fetch(self, name: str, target: Path) -> None:
        self.fetched.append(name)
        self.inner.fetch(name, target)


@pytest.fixture
def bucket(dataset, monkeypatch) -> Bucket:
    bucket = Bucket(LocalFolder(Path(dataset.uri).parent.parent))
    monkeypatch.setattr("diffusion.data.manifest.root_of", lambda uri: bucket)
    return bucket


def test_from_a_bucket_the_batches_are_the_same_and_each_shard_comes_once(dataset, bucket, tmp_path):
    local = ShardReader(dataset.uri)
    local._shards.root = bucket.inner
    wanted = joined(batches(local, order_of(local), 8, stop=200))
    for threads in (0, 2):
        for rank_count in (1, 2):
            bucket.fetched.clear()
            cache = ShardCache(tmp_path / f"{threads}-{rank_count}", 2**30)
            ranks = []
            for rank in range(rank_count):
                opened = ShardReader(dataset.uri, shards=cache)
                part = batches(opened, order_of(opened), 8, stop=200, rank=rank, world=rank_count, threads=threads)
                ranks.append(list(part))
            steps = [part for step in zip(*ranks, strict=True) for part in step]
            assert equal(joined(steps), wanted)
            assert sorted(bucket.fetched) == sorted(entry.tar for entry in opened.entries)
    assert read_ahead_threads() == []


class Inline:
    """A pool that does at once what it is given."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def submit(self, work: Callable, *arguments: object) -> None:
        work(*arguments)

    def shutdown(self, **_: object) -> None:
        pass


@given(
    sizes=st.lists(st.integers(1, 100), min_size=1, max_size=12),
    needs=st.lists(st.lists(st.integers(0, 1_000), min_size=1, max_size=4), max_size=40),
    limit=st.integers(0, 400),
)
@settings(max_examples=100, deadline=None)
def test_shards_are_fetched_in_the_order_of_need_and_no_further_than_allowed(sizes, needs, limit):
    """Pictures 10 s to 10 s + 9 lie in shard s."""
    asked: list[int] = []
    reader = SimpleNamespace(
        entries=[SimpleNamespace(bytes=size) for size in sizes],
        shards_of=lambda pictures: pictures // 10,
        fetch=asked.append,
    )

    def shards_in(parts: list) -> list[int]:
        return list(dict.fromkeys(shard for part in parts for shard in (part.pictures // 10).tolist()))

    parts = [stream._Part(n, np.array(need) % (10 * len(sizes))) for n, need in enumerate(needs)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "ThreadPoolExecutor", Inline)
        planned = 0

        def taken():
            nonlocal planned
            for part in parts:
                planned += 1
                yield part

        for k, part in enumerate(stream._fetching(reader, taken(), limit)):
            assert part is parts[k]
            assert set((part.pictures // 10).tolist()) <= set(asked)
            first = shards_in(parts[:planned])
            if len(set(asked)) == len(asked):  # none was needed, forgotten and needed again
                assert asked == first
                ahead = set(shards_in(parts[k + 1 : planned - 1])) - set(shards_in(parts[: k + 1]))
                assert sum(sizes[shard] for shard in ahead) <= limit
                # and it does look ahead: a step's worth, or as far as it may
                fetching = [shard for shard in first if shard not in shards_in(parts[:k])]
                far = min(len(parts), k + stream._STEP)
                assert planned >= far or sum(sizes[shard] for shard in fetching) >= limit
        assert planned == len(parts)


def test_a_damaged_copy_is_fetched_again_and_a_damaged_shard_read_piece_by_piece(
    dataset, bucket, tmp_path, monkeypatch
):
    cache = ShardCache(tmp_path / "cache", 2**30)
    opened = ShardReader(dataset.uri, shards=cache, cache_mib=0)
    sound = opened.gather(np.arange(len(opened)))
    assert len(bucket.fetched) == 3
    entry = opened.entries[1]
    copy = tmp_path / "cache" / entry.sha256
    copy.write_bytes(copy.read_bytes().replace(SAMPLES[20].image, bytes(len(SAMPLES[20].image))))
    again = ShardReader(dataset.uri, shards=cache, cache_mib=0)
    for _ in range(2):
        assert np.array_equal(again.gather(np.arange(len(again))).images, sound.images)
    assert again.damage.count == 0
    assert bucket.fetched[3:] == [entry.tar]

    root = tmp_path / "damaged"
    shutil.copytree(bucket.uri, root)
    (root / entry.tar).write_bytes(
        (root / entry.tar).read_bytes().replace(SAMPLES[20].image, bytes(len(SAMPLES[20].image)))
    )
    bucket.inner, bucket.pieces = LocalFolder(root), True
    poor = ShardReader(dataset.uri, shards=ShardCache(tmp_path / "other", 2**30), cache_mib=0, max_damaged=0.001)
    read = poor.gather(np.arange(len(poor)))
    assert read.keys == [own.key for own in (*SAMPLES[:20], SAMPLES[21], *SAMPLES[21:])]
    assert [damage.key for damage in poor.damage.news] == [SAMPLES[20].key]
    poor.gather(np.arange(len(poor)))
    assert poor.damage.count == 1


def test_threads_that_meet_a_damaged_copy_at_once_read_the_one_fetched_again(dataset, bucket, tmp_path):
    class Slow(ShardCache):
        def drop(self, sha256: str) -> None:
            time.sleep(0.005)  # gives others the time to come in between
            super().drop(sha256)

    cache, everything = Slow(tmp_path, 2**30), np.arange(len(SAMPLES))
    sound = ShardReader(dataset.uri, shards=cache).gather(everything).images
    for _ in range(10):
        for entry in ShardReader(dataset.uri).entries:
            copy = tmp_path / entry.sha256
            copy.write_bytes(bytes(copy.stat().st_size))
        opened = ShardReader(dataset.uri, shards=cache, cache_mib=0)
        with ThreadPoolExecutor(8) as pool:
            read = list(pool.map(lambda _: opened.gather(everything).images, range(8)))  # noqa: B023
        assert all(np.array_equal(images, sound) for images in read)
        assert opened.damage.count == 0


def test_a_cache_smaller_than_a_shard_is_refused(dataset, bucket, tmp_path):
    with pytest.raises(ValueError, match="raise the bound"):
        ShardReader(dataset.uri, shards=ShardCache(tmp_path, 1_000)).read(0)
