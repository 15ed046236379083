"""What a manifest's shards and parts mean for the order, and for the labels that training sees."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from diffusion.data.datasets import Dataset
from diffusion.data.mix import mix
from diffusion.data.order import CYCLE, Mixture, Order
from diffusion.data.reader import ShardReader
from diffusion.data.reading_order import order_of
from diffusion.data.stream import batches
from diffusion.recipe import TrainRecipe
from diffusion.store.storage import LocalFolder
from tests.made_dataset import Made, published

RECIPE = TrainRecipe(seed=7, window=30, streams=3)


@pytest.fixture
def root(tmp_path: Path) -> LocalFolder:
    return LocalFolder(tmp_path)


def test_blocks_have_the_size_of_the_fullest_shard(root: LocalFolder) -> None:
    made = published(root, [Made(n) for n in range(10)], shard_size=4).manifest
    assert order_of(made, "train", RECIPE) == Order(10, 4, seed=7, window=30, streams=3)


def mixed(root: LocalFolder) -> tuple[Dataset, dict[str, Made]]:
    """A mixture of 12 to 5 training pictures with weights 1 to 3, and its pictures by key."""
    many = [Made(n, ("cats", "dogs")[n % 2], "holdout" if n > 11 else "train") for n in range(14)]
    few = [Made(50 + n, ("ants", "dogs")[n % 2]) for n in range(5)]
    datasets = [(published(root, many), 1.0), (published(root, few, shard_size=2), 3.0)]
    return mix(root, datasets), {made.key: made for made in (*many, *few)}


def test_a_mixture_is_read_by_weight_with_each_part_whole_in_its_own_epochs(root: LocalFolder) -> None:
    made, by_key = mixed(root)
    order = order_of(made.manifest, "train", RECIPE)
    weights = tuple(part.weight for part in made.manifest.parts)
    sizes = {1.0: Order(12, 4, seed=7, window=30, streams=3), 3.0: Order(5, 2, seed=7, window=30, streams=3)}
    assert order == Mixture(tuple(sizes[weight] for weight in weights), weights, 7)
    reader = ShardReader(made.uri, digest=made.digest)
    read = Counter(key for batch in batches(reader, order, 50, stop=CYCLE) for key in batch.keys)
    shares = {True: Counter(), False: Counter()}
    for key, count in read.items():
        shares[by_key[key].look < 50][key] = count
    assert (shares[True].total(), shares[False].total()) == (CYCLE // 4, 3 * CYCLE // 4)
    for share, pictures in ((shares[True], 12), (shares[False], 5)):
        assert len(share) == pictures
        assert max(share.values()) - min(share.values()) <= 1


def test_training_sees_the_pictures_and_classes_of_the_mixture_and_nothing_held_out(root: LocalFolder) -> None:
    made, by_key = mixed(root)
    classes = made.manifest.classes
    assert classes == ("ants", "cats", "dogs")
    for split in ("train", "holdout"):
        reader = ShardReader(made.uri, split)
        batch = next(iter(batches(reader, order_of(made.manifest, split, RECIPE), len(reader), stop=len(reader))))
        for key, label, image in zip(batch.keys, batch.label.tolist(), batch.images, strict=True):
            assert (by_key[key].label, by_key[key].split) == (classes[label], split)
            assert np.array_equal(image.permute(1, 2, 0).numpy(), by_key[key].image)
        assert [classes[label] for label in reader.labels] == [by_key[key].label for key in reader.keys]


def test_the_substitute_of_a_damaged_picture_has_its_own_class(root: LocalFolder) -> None:
    made, by_key = mixed(root)
    lost = made.manifest.entries("train")[0]
    data = bytearray(root.read(lost.tar))
    index = np.load(root.path(lost.index))
    for row in index[:-1]:
        data[row["image_offset"] + 50] ^= 255
    root.put(lost.tar, bytes(data))
    reader = ShardReader(made.uri, max_damaged=0.99)
    got = reader.gather(np.arange(len(index)))
    assert set(got.keys) == {index["key"][-1].decode()}
    assert {made.manifest.classes[label] for label in got.label} == {by_key[got.keys[0]].label}


def test_a_weight_that_would_never_be_drawn_is_refused_before_anything_is_published(root: LocalFolder) -> None:
    a, b = published(root, [Made(1)]), published(root, [Made(2)])
    before = list(root.walk())
    with pytest.raises(ValueError, match="would never be drawn"):
        mix(root, [(a, 1e6), (b, 1)])
    assert list(root.walk()) == before
