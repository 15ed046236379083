"""Batches: what a position holds depends on nothing else; damage is named; threads end."""

import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusion.data import ingest
from diffusion.data.manifest import load
from diffusion.data.order import Order
from diffusion.data.stream import ShardReader, batches
from diffusion.recipe import ShardRecipe
from diffusion.store.refs import DatasetRef

RECIPE = ShardRecipe(resolution=32, shard_size=16, holdout=0.2)


@pytest.fixture(scope="module")
def dataset(emoji_folder, tmp_path_factory) -> DatasetRef:
    return ingest.shard_dataset(emoji_folder, RECIPE, tmp_path_factory.mktemp("store"))


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
    for place, i in enumerate(order.at(25, 10).tolist()):
        sample = reader.read(i)
        assert np.array_equal(batch.images[place].permute(1, 2, 0).numpy(), sample.image)
        assert (batch.keys[place], batch.captions[place]) == (sample.key, sample.caption)
        assert batch.label[place] == sample.label
        assert sample.caption


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


def test_batches_are_the_callers_to_change(dataset):
    reader = ShardReader(dataset.uri)
    first = next(batches(reader, order_of(reader), 8))
    before = first.images.clone()
    first.images.zero_()
    first.label.zero_()
    again = next(batches(reader, order_of(reader), 8))
    assert torch.equal(again.images, before)
    assert again.label.any()
    reader.read(0).image[:] = 0
    assert reader.read(0).image.any()


def test_the_cache_stays_within_its_bound_and_serves_without_the_disk(dataset, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(dataset.uri, folder)
    readers = {mib: ShardReader(folder, cache_mib=mib) for mib in (0, 1)}
    for reader in readers.values():
        reader.gather(np.arange(len(reader)))
    for shard in folder.glob("*.tar"):
        shard.unlink()
    pictures, captions = readers[1].gather(np.arange(len(readers[1])))
    assert pictures.nbytes <= 2**20
    assert all(captions)
    with pytest.raises(ValueError, match=r"train-000000.tar"):
        readers[0].read(0)


def test_a_small_cache_keeps_a_part(emoji_folder, tmp_path):
    ref = ingest.shard_dataset(emoji_folder, RECIPE.model_copy(update={"resolution": 256}), tmp_path)
    small, none = ShardReader(ref.uri, cache_mib=2), ShardReader(ref.uri, cache_mib=0)  # 10 of about 48 fit
    assert 0 < small._pictures.nbytes <= 2 * 2**20
    for _ in range(2):
        everything = np.arange(len(small))[::-1]
        assert np.array_equal(small.gather(everything)[0], none.gather(everything)[0])
        assert small.gather(everything)[1] == none.gather(everything)[1]


def spoil(dataset: DatasetRef, tmp_path: Path, name: str) -> Path:
    folder = tmp_path / "copy"
    shutil.copytree(dataset.uri, folder)
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    return folder


def test_a_changed_shard_is_found_before_its_first_picture_is_used(dataset, tmp_path):
    folder = spoil(dataset, tmp_path, "train-000001.tar")
    reader = ShardReader(folder)
    reader.read(0)
    with pytest.raises(ValueError, match=r"train-000001.tar has sha256 .* `diffusion shard`"):
        reader.read(reader.counts[0])
    with pytest.raises(ValueError, match=r"train-000001.tar"):
        list(batches(reader, order_of(reader), 4, stop=len(reader)))
    assert read_ahead_threads() == []


def test_a_changed_index_or_manifest_is_found_on_opening(dataset, tmp_path):
    with pytest.raises(ValueError, match=r"train-000000.index.json is missing or differs"):
        ShardReader(spoil(dataset, tmp_path, "train-000000.index.json"))
    with pytest.raises(ValueError, match="is asked for"):
        ShardReader(dataset.uri, digest="00" * 32)


def test_a_shard_damaged_after_its_check_names_shard_key_and_command(dataset, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(dataset.uri, folder)
    reader = ShardReader(folder, cache_mib=0)
    reader.read(0)
    path = folder / load(folder).shards[0].name
    path.write_bytes(path.read_bytes()[:5_000])
    last = reader.counts[0] - 1
    with pytest.raises(ValueError, match=rf"train-000000.tar .*key {reader.keys[last]} .*`diffusion shard`"):
        reader.read(last)


def test_threads_end_when_the_stream_ends_or_is_closed_or_forgotten(dataset):
    reader = ShardReader(dataset.uri)
    order = order_of(reader)
    list(batches(reader, order, 8, stop=32))
    assert read_ahead_threads() == []
    stream = batches(reader, order, 8)
    next(stream)
    assert read_ahead_threads()
    stream.close()
    assert read_ahead_threads() == []
    stream = batches(reader, order, 8)
    next(stream)
    del stream
    assert read_ahead_threads() == []


def test_read_ahead_is_bounded(dataset):
    class Counting(Order):
        calls = []

        def at(self, start, count):
            self.calls.append(start)
            return super().at(start, count)

    reader = ShardReader(dataset.uri)
    stream = batches(reader, Counting(len(reader), 16, 3, 8, 4), 8, threads=2, ahead=3)
    next(stream)
    time.sleep(0.3)  # long enough for threads to run away if they could
    assert len(Counting.calls) <= 3
    stream.close()


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


def test_many_readers_at_once_check_each_shard_once_and_agree(dataset):
    reader = ShardReader(dataset.uri, cache_mib=0)
    results: dict[int, np.ndarray] = {}

    def work(number: int) -> None:
        results[number] = reader.gather(np.arange(len(reader)))[0]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(results[0], results[number]) for number in range(4))
