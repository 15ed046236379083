"""A dataset in aspect buckets from its source to its batches: one size a shard, nothing lost, order and versions as ever."""

from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion.data import ingest, manifest, quarantine
from diffusion.data.compare import difference
from diffusion.data.datasets import Dataset, opened
from diffusion.data.dry_run import dry_run
from diffusion.data.images import decode_png
from diffusion.data.lint import lint
from diffusion.data.manifest import Manifest
from diffusion.data.mix import mix
from diffusion.data.pictures.buckets import size_for
from diffusion.data.pictures.fit import fit
from diffusion.data.preview import preview, sheet
from diffusion.data.reader import ShardReader
from diffusion.data.reading_order import order_of
from diffusion.data.report import overview
from diffusion.data.shards import read_index
from diffusion.data.stream import batches
from diffusion.recipe import TrainRecipe
from diffusion.store.refs import DatasetRef
from diffusion.store.storage import LocalFolder
from tests.published import accounts_for, content, identity, samples_of
from tests.shapes import RECIPE, SIZES, write
from tests.test_ingest import shuffled_each, side_files

TRAIN = TrainRecipe(batch_size=24, window=8, streams=3, seed=5)
WORLDS = (1, 2, 3, 4, 6, 8)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("shapes"))


@pytest.fixture(scope="module")
def dataset(source, tmp_path_factory) -> DatasetRef:
    return ingest.shard_dataset(source, RECIPE, tmp_path_factory.mktemp("root"))


def test_every_picture_is_in_a_shard_of_its_bucket(dataset, source):
    made = accounts_for(dataset.uri, {str(path.relative_to(source)) for path in source.rglob("*.png")})
    size_of = {entry.sha256: made.size_of(entry) for entry in made.shards}
    for sample in samples_of(dataset.uri):
        original = Image.open(source / sample.facts["source"])
        size = size_for(*original.size, RECIPE)
        assert size_of[sample.shard] == size
        wanted = fit(original.convert("RGB"), size=size, background=RECIPE.background)
        assert np.array_equal(decode_png(sample.image), wanted)
    assert dataset.sizes == SIZES == made.processing.buckets
    for split in ("train", "holdout"):
        sizes = [made.size_of(entry) for entry in made.entries(split)]
        assert sizes == sorted(sizes, reverse=True)
        for entry, (size, after) in zip(made.entries(split), pairwise(sizes), strict=False):
            assert size != after or entry.pictures == RECIPE.shard_size
    assert sum(made.by_size("train").values()) == made.images
    assert lint(opened(dataset.uri)) == []


def test_same_input_same_bytes(dataset, source, tmp_path, monkeypatch):
    monkeypatch.setattr(ingest, "_CHUNK_FILES", 7)
    again = ingest.shard_dataset(source, RECIPE, tmp_path, each=shuffled_each)
    assert identity(again.uri) == identity(dataset.uri)
    assert side_files(again.uri) == side_files(dataset.uri)


def test_equal_pixels_of_another_shape_are_another_picture(tmp_path):
    source, recipe = tmp_path / "source", RECIPE.model_copy(update={"holdout": 0})
    source.mkdir()
    for name, size in {"high": (24, 40), "wide": (40, 24), "wider": (80, 48)}.items():
        Image.new("RGB", size, "#808080").save(source / f"{name}.png")
    made = manifest.load(ingest.shard_dataset(source, recipe, tmp_path / "root").uri)
    assert (made.by_size("train"), made.set_aside) == ({(40, 24): 1, (24, 40): 1}, {"duplicate": 1})


def test_a_new_version_shares_the_full_shards_of_each_bucket(source, tmp_path):
    folder, root = write(tmp_path / "source"), tmp_path / "root"
    first = ingest.shard_dataset(folder, RECIPE, root)
    before = content(root / "shards")
    write(folder, 20, first=70)
    second = ingest.shard_dataset(folder, RECIPE, root)
    accounts_for(second.uri, {str(path.relative_to(folder)) for path in folder.rglob("*.png")})
    assert before.items() <= content(root / "shards").items()
    old, new = manifest.load(first.uri), manifest.load(second.uri)
    stay = {entry.sha256 for entry in old.shards} & {entry.sha256 for entry in new.shards}
    full = {entry.sha256 for entry in old.shards if entry.pictures == RECIPE.shard_size}
    assert stay >= full
    assert {old.size_of(entry) for entry in old.shards if entry.sha256 in full} == set(SIZES)
    assert lint(opened(second.uri)) == []
    assert difference(opened(first.uri), opened(second.uri)).added == 20
    assert ingest.shard_dataset(folder, RECIPE, root) == second


def test_a_released_picture_comes_into_its_bucket(source, tmp_path):
    recipe, root = RECIPE.model_copy(update={"max_aspect": 3, "max_rejected": 0.5}), LocalFolder(tmp_path)
    first = ingest.shard_dataset(source, recipe, tmp_path)
    assert manifest.load(first.uri).set_aside == {"too elongated": 10}
    held = next(quarantine.entries(root, first.digest))
    second = ingest.release(root, first.digest, [held.sha256])
    made = manifest.load(second.uri)
    size_of = {entry.sha256: made.size_of(entry) for entry in made.shards}
    assert [size_of[s.shard] for s in samples_of(second.uri) if s.facts["source"] == held.name] == [(24, 40)]
    assert lint(opened(second.uri)) == []


def test_what_a_dry_run_expects_comes_true(source, dataset, tmp_path):
    found = dry_run(source, RECIPE, LocalFolder(tmp_path))
    made = manifest.load(dataset.uri)
    train, held = made.by_size("train"), made.by_size("holdout")
    assert found.sampled.sizes == {size: train[size] + held.get(size, 0) for size in SIZES}


def test_people_see_the_buckets_and_those_with_few_pictures(dataset):
    lines, made = overview(opened(dataset.uri)), manifest.load(dataset.uri)
    for height, width in SIZES:
        assert f"{width}x{height} {made.by_size('train')[height, width]} + " in lines["buckets"]
    rare = [size for size in SIZES if made.by_size("train")[size] < 32]
    assert rare
    assert all(f"{width}x{height} (" in lines["few"] for height, width in rare)
    rows = {name: [shown.image for shown in row] for name, row in preview(opened(dataset.uri)).items()}
    assert {image.shape[:2] for row in rows.values() for image in row} == set(SIZES)
    page = sheet(rows)
    cell = 2 * 40 + 2  # the longest side, twice as large, and the gap
    assert (page.shape[0] - 2, (page.shape[1] - 2) // cell) == (2 * cell, 8)
    assert lint(opened(dataset.uri)) == []


def test_a_size_that_is_none_of_the_dataset_s_is_refused(dataset):
    made = manifest.load(dataset.uri)
    wrong = made.shards[0].model_copy(update={"size": (16, 64)})
    with pytest.raises(ValueError, match="no size of this dataset"):
        Manifest(**{**dict(made), "shards": (wrong, *made.shards[1:])})
    with pytest.raises(ValueError, match="do not follow each other"):
        Manifest(**{**dict(made), "shards": made.shards[::-1]})


def test_pictures_of_another_size_than_their_shard_s_are_found(dataset):
    made = manifest.load(dataset.uri)
    wrong = made.shards[0].model_copy(update={"size": (24, 40)})
    told = Dataset(dataset.uri, made.model_copy(update={"shards": (wrong, *made.shards[1:])}))
    assert Counter(finding.place for finding in lint(told) if "24" in finding.what) == {wrong.tar: wrong.pictures}


# batches


def sizes_of(reader: ShardReader, pictures: np.ndarray) -> set[tuple[int, int]]:
    return {reader.sizes[shard] for shard in reader.shards_of(pictures).tolist()}


@pytest.mark.parametrize("cache_mib", [0, 1])
def test_pictures_of_one_size_are_a_batch_and_others_none(dataset, cache_mib):
    reader = ShardReader(dataset.uri, cache_mib=cache_mib)
    everything = np.random.default_rng(1).permutation(len(reader))
    groups = reader.by_size(everything)
    assert sorted(np.concatenate(groups).tolist()) == list(range(len(reader)))
    rows = [row for row in samples_of(dataset.uri) if row.split == "train"]
    for _ in range(2):  # from the disk, then from memory
        for places in groups:
            pictures = reader.gather(everything[places])
            assert sizes_of(reader, everything[places]) == {pictures.images.shape[1:3]}
            for image, i in zip(pictures.images, everything[places], strict=True):
                assert np.array_equal(image, decode_png(rows[i].image))
    with pytest.raises(ValueError, match="gather those of one size at a time"):
        reader.gather(everything)


def test_a_damaged_picture_is_stood_in_for_by_one_of_its_size(tmp_path):
    dataset = ingest.shard_dataset(write(tmp_path / "source"), RECIPE, tmp_path / "root")
    made = manifest.load(dataset.uri)
    for size in SIZES:  # all of a size but its first picture, which the search comes to last
        entries = [entry for entry in made.entries("train") if made.size_of(entry) == size]
        for entry in entries:
            path = tmp_path / "root" / entry.tar
            index, data = read_index(LocalFolder(tmp_path / "root"), entry), bytearray(path.read_bytes())
            for row in index[entry is entries[0] :]:
                data[int(row["image_offset"]) + 40] ^= 1
            path.write_bytes(data)
    reader = ShardReader(dataset.uri, max_damaged=0.999)
    for places in reader.by_size(np.arange(len(reader))):
        found = reader.gather(places)
        assert found.keys == [found.keys[0]] * len(places)
    assert reader.damage.count == len(reader) - len(SIZES)


def joined(parts: list) -> tuple[torch.Tensor, list[str], list[int]]:
    index = torch.cat([part.index for part in parts]).tolist()
    return torch.cat([part.images for part in parts]), [key for part in parts for key in part.keys], index


def test_any_number_of_workers_killed_anywhere_reads_the_same_global_batches(dataset):
    """Ranks x reader threads, killed at random batches and gone on with by another number."""
    reader = ShardReader(dataset.uri)
    order, stop = order_of(reader.manifest, "train", TRAIN), 24 * 40
    whole = list(batches(reader, order, 24, stop=stop, threads=0))
    assert {tuple(batch.images.shape[2:]) for batch in whole} == set(SIZES)
    assert [batch.index.tolist() for batch in whole] == [list(range(24 * n, 24 * n + 24)) for n in range(40)]
    chance = np.random.default_rng(0)
    for first in WORLDS:
        seen, start, world = 0, 0, first
        while start < stop:
            until = min(stop, start + 24 * int(chance.integers(1, 20)))
            threads = int(chance.integers(0, 5))
            ranks = [
                batches(
                    ShardReader(dataset.uri), order, 24, start=start, stop=stop, rank=rank, world=world, threads=threads
                )
                for rank in range(world)
            ]
            for number in range(start // 24, until // 24):
                images, keys, index = joined([next(rank) for rank in ranks])
                assert torch.equal(images, whole[number].images)
                assert (keys, index) == (whole[number].keys, whole[number].index.tolist())
                seen += 1
            for rank in ranks:
                rank.close()
            start, world = until, int(chance.choice(WORLDS))
        assert seen == len(whole)


def test_every_picture_comes_once_in_each_epoch_of_its_bucket(dataset):
    reader = ShardReader(dataset.uri)
    order = order_of(reader.manifest, "train", TRAIN)
    by_size: dict[tuple[int, ...], list[str]] = {size: [] for size in SIZES}
    for batch in batches(reader, order, 24, stop=24 * len(reader)):
        by_size[tuple(batch.images.shape[2:])] += batch.keys
    for size, count in reader.manifest.by_size("train").items():
        assert len(by_size[size]) == 24 * count  # shares are exact in as many batches as there are pictures
        for epoch in range(24):
            assert len(set(by_size[size][epoch * count : (epoch + 1) * count])) == count


def test_a_start_within_a_batch_and_another_batch_are_refused(dataset):
    reader = ShardReader(dataset.uri)
    order = order_of(reader.manifest, "train", TRAIN)
    with pytest.raises(ValueError, match="start=12 lies within a batch of 24"):
        batches(reader, order, 24, start=12)
    with pytest.raises(ValueError, match="not of 12"):
        batches(reader, order, 12)


def test_a_mixture_keeps_the_weights_of_its_parts_and_the_shares_of_their_buckets(dataset, tmp_path):
    root = LocalFolder(tmp_path / "root")
    parts = [
        opened(ingest.shard_dataset(write(tmp_path / name, count, first=first), RECIPE, root).uri)
        for name, count, first in (("a", 42, 0), ("b", 63, 100))
    ]
    mixed = mix(root, list(zip(parts, (3.0, 0.5), strict=True)))
    assert lint(mixed) == []
    reader = ShardReader(mixed.uri)
    order = order_of(mixed.manifest, "train", TRAIN)
    total = sum(order.shares)
    entries, border = mixed.manifest.entries("train"), mixed.manifest.parts[0].train
    owner = np.repeat([0, 1], [sum(entry.pictures for entry in own) for own in (entries[:border], entries[border:])])
    turns = Counter(order.turn(number)[0] for number in range(total))
    first = np.cumsum([0, *map(len, order.parts)])
    shares = {}  # (part, size) -> of all batches
    for group, pictures in enumerate(np.arange(low, high) for low, high in pairwise(first.tolist())):
        (size,), (part,) = sizes_of(reader, pictures), set(owner[pictures].tolist())
        shares[part, size] = turns[group] / total
    weights = {part.dataset: part.weight for part in mixed.manifest.parts}
    for number, part in enumerate(mixed.manifest.parts):
        own = next(dataset for dataset in parts if dataset.digest == part.dataset).manifest
        for size, count in own.by_size("train").items():
            assert shares[number, size] == pytest.approx(weights[part.dataset] / 3.5 * count / own.images, abs=1e-12)


def test_parts_with_other_buckets_are_not_mixed(dataset, source, tmp_path):
    root = LocalFolder(tmp_path)
    square = ingest.shard_dataset(source, RECIPE.model_copy(update={"bucket_aspect": None}), root)
    bucketed = ingest.shard_dataset(source, RECIPE, root)
    assert square.sizes == ()
    assert list(difference(opened(square.uri), opened(bucketed.uri)).facts) == ["buckets"]
    with pytest.raises(ValueError, match=r"has buckets .* has none"):
        mix(root, [(opened(square.uri), 1), (opened(bucketed.uri), 1)])


def test_a_bucketed_dataset_of_squares_alone_is_read_as_one_of_squares(tmp_path):
    folder = tmp_path / "source"
    for i in range(9):
        write(folder, 1, first=2 + 7 * i)  # the third shape
    recipe = RECIPE.model_copy(update={"holdout": 0})
    bucketed = ingest.shard_dataset(folder, recipe, tmp_path / "root")
    square = ingest.shard_dataset(folder, recipe.model_copy(update={"bucket_aspect": None}), tmp_path / "root")
    made = [manifest.load(ref.uri) for ref in (bucketed, square)]
    assert made[0].shards == made[1].shards
    assert order_of(made[0], "train", TRAIN) == order_of(made[1], "train", TRAIN)
