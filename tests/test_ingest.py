"""Sharding as a whole: same input, same bytes; every file accounted for; splits that keep their promises."""

import io
import json
import random
import shutil
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from diffusion.data import ingest, manifest
from diffusion.data.quarantine import TooManyRejected
from diffusion.data.sources import BadSource
from diffusion.data.stream import ShardReader
from diffusion.recipe import ShardRecipe

RECIPE = ShardRecipe(resolution=32, shard_size=16, holdout=0.2)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_every_picture_is_in_one_split_with_its_facts(emoji_folder, tmp_path):
    seen = []
    ref = ingest.shard_dataset(emoji_folder, RECIPE, tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (60, 60)
    assert ref.classes == ("flags", "food-drink", "smileys-emotion")
    made = manifest.verify(ref.uri, digest=ref.digest)
    assert Path(ref.uri) == tmp_path / "datasets" / ref.digest[:16]
    assert ref.images + ref.holdout + sum(made.set_aside.values()) == 60
    assert all(entry.pictures == 16 for entry in made.entries("train")[:-1])
    rows = {(r := json.loads(line))["file_name"]: r for line in (emoji_folder / "metadata.jsonl").open()}
    splits = [ShardReader(ref.uri, split) for split in ("train", "holdout")]
    keys = [key for reader in splits for key in reader.keys]
    assert len(set(keys)) == len(keys) == ref.images + ref.holdout
    for reader in splits:
        assert reader.keys == sorted(reader.keys)  # by content: classes are mixed
        facts = [json.loads(line) for line in members(ref.uri, reader.split, "json")]
        for i, fact in enumerate(facts):
            row, sample = rows[fact["source"]], reader.read(i)
            assert (
                (fact["caption"], fact["label"])
                == (row["text"], row["label"])
                == (
                    sample.caption,
                    ref.classes[sample.label],
                )
            )
            assert fact["content_sha256"].startswith(sample.key)
            assert fact["metadata"] == {key: row[key] for key in ("keywords", "subcategory")}
    assert {path.name for path in tmp_path.iterdir()} == {"datasets"}
    assert {path.name for path in (tmp_path / "datasets").iterdir()} == {ref.digest[:16]}


def members(uri: str, split: str, extension: str) -> list[bytes]:
    import webdataset as wds

    shards = [str(path) for path in sorted(Path(uri).glob(f"{split}-*.tar"))]
    return [row[extension] for row in wds.WebDataset(shards, shardshuffle=False)]


def test_pictures_are_what_an_independent_reading_gives(emoji_folder, tmp_path):
    """The emoji, composited by hand in floating point at their own size."""
    import numpy as np

    ref = ingest.shard_dataset(emoji_folder, ShardRecipe(resolution=64, background="#204060"), tmp_path)
    reader = ShardReader(ref.uri)
    for i, fact in enumerate(json.loads(line) for line in members(ref.uri, "train", "json")):
        rgba = np.asarray(Image.open(emoji_folder / fact["source"]).convert("RGBA")).astype(float)
        alpha = rgba[..., 3:] / 255
        expected = rgba[..., :3] * alpha + np.array([0x20, 0x40, 0x60]) * (1 - alpha)
        assert np.abs(reader.read(i).image - expected).max() <= 1


def shuffled_each(function, tasks):
    """Several workers whose answers come in any order."""
    results = list(ThreadPoolExecutor(3).map(function, tasks))
    random.Random(1).shuffle(results)
    return results


def test_same_input_same_bytes_for_any_workers_listing_and_container(emoji_folder, tmp_path):
    first = ingest.shard_dataset(emoji_folder, RECIPE, tmp_path / "one")
    second = ingest.shard_dataset(emoji_folder, RECIPE, tmp_path / "two", each=shuffled_each)
    names = [path for path in emoji_folder.rglob("*") if path.is_file()]
    random.Random(2).shuffle(names)
    copied = tmp_path / "copied"
    with zipfile.ZipFile(tmp_path / "shuffled.zip", "w") as archive:
        for path in names:
            name = path.relative_to(emoji_folder)
            (copied / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copied / name)
            archive.write(path, name)
    third = ingest.shard_dataset(copied, RECIPE, tmp_path / "three")
    fourth = ingest.shard_dataset(tmp_path / "shuffled.zip", RECIPE, tmp_path / "four")
    assert len({ref.digest for ref in (first, second, third, fourth)}) == 1
    for other in (second, third, fourth):
        assert content(Path(other.uri)) == content(Path(first.uri))


def test_published_is_reused_never_rewritten_and_damage_is_noticed(emoji_folder, tmp_path):
    first = ingest.shard_dataset(emoji_folder, RECIPE, tmp_path)
    inode = Path(first.uri).stat().st_ino
    assert ingest.shard_dataset(emoji_folder, RECIPE, tmp_path) == first
    assert Path(first.uri).stat().st_ino == inode
    assert [path.name for path in (tmp_path / "datasets").iterdir()] == [first.digest[:16]]
    next(Path(first.uri).glob("train-*.tar")).unlink()
    with pytest.raises(ValueError, match=r"is missing: remove the folder .* `diffusion shard`"):
        ingest.shard_dataset(emoji_folder, RECIPE, tmp_path)


def other_recipes():
    return [
        RECIPE.model_copy(update=change)
        for change in ({"resolution": 64}, {"background": "#000000"}, {"shard_size": 8}, {"holdout": 0.1})
    ]


def test_what_changes_the_data_changes_the_digest(emoji_folder, tmp_path):
    digests = {ingest.shard_dataset(emoji_folder, recipe, tmp_path).digest for recipe in [RECIPE, *other_recipes()]}
    assert len(digests) == 5


def test_held_out_pictures_are_the_same_at_another_resolution(emoji_folder, tmp_path):
    keys = [
        set(ShardReader(ingest.shard_dataset(emoji_folder, recipe, tmp_path).uri, "holdout").keys)
        for recipe in (RECIPE, RECIPE.model_copy(update={"resolution": 64}))
    ]
    assert keys[0] == keys[1]


@pytest.fixture
def spoilt_folder(emoji_folder, tmp_path) -> Path:
    """The sixty pictures, four damaged files, and two copies of one picture: as the file, and re-encoded."""
    folder = tmp_path / "spoilt"
    shutil.copytree(emoji_folder, folder)
    good = sorted((folder / "flags").iterdir())[0]
    (folder / "flags" / "empty.png").write_bytes(b"")
    (folder / "flags" / "text.png").write_text("hello")
    (folder / "food-drink" / "cut.png").write_bytes(good.read_bytes()[:-300])
    (folder / "smileys-emotion" / "zzz-cut.png").write_bytes(good.read_bytes()[:-300])
    (folder / "zebra").mkdir()
    shutil.copyfile(good, folder / "zebra" / "same.png")
    Image.open(good).save(folder / "zebra" / "same.webp", lossless=True, exact=True)
    return folder


def test_bad_files_are_set_aside_and_duplicates_kept_once(spoilt_folder, emoji_folder, tmp_path):
    ref = ingest.shard_dataset(spoilt_folder, RECIPE, tmp_path / "store")
    clean = ingest.shard_dataset(emoji_folder, RECIPE, tmp_path / "store")
    shuffled = ingest.shard_dataset(spoilt_folder, RECIPE, tmp_path / "shuffled", each=shuffled_each)
    assert content(Path(shuffled.uri)) == content(Path(ref.uri))  # also which of the duplicates is kept
    assert ref.rejected == 4
    assert (ref.images, ref.holdout) == (clean.images, clean.holdout)
    assert ref.classes == clean.classes  # zebra held only copies
    assert ref.digest != clean.digest
    made = manifest.load(ref.uri)
    assert made.set_aside == {"duplicate": 2, "empty": 1, "not a picture": 1, "truncated": 2}
    assert made.shards == manifest.load(clean.uri).shards
    rows = [json.loads(line) for line in (Path(ref.uri) / "quarantine" / "reasons.jsonl").open()]
    assert Counter(row["kind"] for row in rows) == made.set_aside
    for row in rows:
        if row["kind"] == "duplicate":
            assert row["original"] is None
            assert "kept as flags; this one says zebra" in row["detail"]
        else:
            assert (Path(ref.uri) / "quarantine" / row["original"]).read_bytes() == (
                spoilt_folder / row["name"]
            ).read_bytes()


def test_too_many_bad_files_stop_with_something_to_type_and_leave_them_to_look_at(spoilt_folder, tmp_path):
    recipe = RECIPE.model_copy(update={"max_rejected": 0.05})
    with pytest.raises(TooManyRejected, match=r"(?s)4 of 66 files cannot be used .*max_rejected=0.07") as error:
        ingest.shard_dataset(spoilt_folder, recipe, tmp_path / "store")
    kept = next((tmp_path / "store" / "quarantine").iterdir())
    assert str(kept) in str(error.value)
    assert len(list((kept / "originals").iterdir())) == 4
    assert list((tmp_path / "store" / "datasets").iterdir()) == []
    with pytest.raises(TooManyRejected):  # again, with the quarantine there already
        ingest.shard_dataset(spoilt_folder, recipe, tmp_path / "store")
    ingest.shard_dataset(spoilt_folder, recipe.model_copy(update={"max_rejected": 0.07}), tmp_path / "store")


def samples_of(draws: list[tuple[int, str]]) -> list[dict]:
    from hashlib import sha256

    contents = {sha256(str(number).encode()).hexdigest(): label for number, label in draws}
    return [{"key": content[:32], "content": content, "label": label} for content, label in contents.items()]


@given(st.lists(st.tuples(st.integers(0, 500), st.sampled_from("abc")), min_size=1, max_size=60), st.floats(0, 0.9))
def test_splits_keep_their_promises(draws, share):
    samples = samples_of(draws)
    labels = {sample["label"] for sample in samples}
    if share > 0 and len(samples) == len(labels):
        with pytest.raises(BadSource, match="Add pictures"):
            ingest.divide(samples, share)
        return
    train, held = ingest.divide(samples, share)
    assert {s["label"] for s in train} == labels
    assert bool(held) == (share > 0)
    assert sorted(s["key"] for s in train + held) == sorted(s["key"] for s in samples)
    assert ingest.divide(samples[::-1], share) == (train, held)
    grown = samples + [s for s in samples_of([(n, "a") for n in range(501, 540)]) if s not in samples]
    moved = {s["key"] for s in held} ^ {s["key"] for s in ingest.divide(grown, share)[1] if s in samples}
    assert len(moved) <= len(labels) + 1  # only the exceptions for small sets can move


def test_the_share_held_out_is_the_recipes():
    train, held = ingest.divide(samples_of([(n, "ab"[n % 2]) for n in range(20_000)]), 0.05)
    assert len(train) + len(held) == 20_000
    # binomial: standard deviation sqrt(20000 x 0.05 x 0.95) = 30.8
    assert abs(len(held) - 1000) < 5 * 30.8


def test_nothing_to_hold_out_and_one_class(tmp_path):
    (tmp_path / "one").mkdir()
    for i in range(3):
        Image.new("RGB", (20, 30), (i * 50, 0, 0)).save(tmp_path / "one" / f"{i}.jpg")
    ref = ingest.shard_dataset(tmp_path / "one", RECIPE.model_copy(update={"holdout": 0}), tmp_path / "store")
    assert (ref.images, ref.holdout, ref.classes) == (3, 0, ("picture",))
    with pytest.raises(ValueError, match=r"no pictures in split 'holdout'.*shard.holdout"):
        ShardReader(ref.uri, "holdout")
    some = ingest.shard_dataset(tmp_path / "one", RECIPE, tmp_path / "store")
    assert (some.images, some.holdout) == (2, 1)


def test_classes_are_ordered_by_name_or_number():
    assert ingest.class_names(["b", "a", "b", "C"]) == ("C", "a", "b")
    assert ingest.class_names(["10", "9", "0"]) == ("0", "9", "10")


def test_a_failed_run_leaves_nothing(emoji_folder, tmp_path):
    def failing(function, tasks):
        yield function(tasks[0])
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        ingest.shard_dataset(emoji_folder, RECIPE, tmp_path, each=failing)
    assert list((tmp_path / "datasets").iterdir()) == []


def test_jpeg_and_other_formats_are_sharded(tmp_path):
    for i, format in enumerate(("JPEG", "WEBP", "GIF", "BMP", "TIFF", "PNG")):
        out = io.BytesIO()
        Image.new("RGB", (40, 30), (i * 40, 100, 0)).save(out, format)
        folder = tmp_path / "s" / format.lower()
        folder.mkdir(parents=True)
        (folder / f"x.{'tif' if format == 'TIFF' else format.lower()}").write_bytes(out.getvalue())
    ref = ingest.shard_dataset(tmp_path / "s", RECIPE.model_copy(update={"holdout": 0}), tmp_path / "store")
    assert ref.classes == ("bmp", "gif", "jpeg", "png", "tiff", "webp")
    assert ref.images == 6
