"""Versions: whatever a source goes through, every file is accounted for, splits stay, unchanged shards are shared, and
nothing that is published changes."""

import json
import os
import shutil
import tempfile
import zipfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion.data import ingest, manifest, versions
from diffusion.data.datasets import opened
from diffusion.data.dry_run import dry_run
from diffusion.data.images import decode_png, encode_png
from diffusion.data.lint import lint
from diffusion.data.pack import decode_chunk
from diffusion.data.quarantine import TooManyRejected
from diffusion.data.sources import BadSource
from diffusion.recipe import ShardRecipe
from diffusion.store.refs import DatasetRef
from diffusion.store.storage import LocalFolder
from tests.published import accounts_for, content, files_of, identity, samples_of
from tests.test_ingest import shuffled_each, side_files

RECIPE = ShardRecipe(resolution=8, shard_size=4, holdout=0.3, max_rejected=0.99)
DAMAGED = -1


class File(NamedTuple):
    """A file of a source: `look` decides its pixels; DAMAGED is none."""

    look: int
    label: str = "a"
    caption: str = ""


def pixels(look: int) -> np.ndarray:
    return np.random.default_rng(look).integers(0, 256, (8, 8, 3), dtype=np.uint8)


def write(folder: Path, files: dict[str, File]) -> Path:
    """Make the folder hold these files alone.  A file that is as it was is left alone; times tell the others apart."""
    folder.mkdir(exist_ok=True)
    for path in folder.glob("*.png"):
        if path.name not in files:
            path.unlink()
    for name, file in files.items():
        data = b"no picture" if file.look == DAMAGED else encode_png(pixels(file.look))
        path = folder / name
        if not path.exists() or path.read_bytes() != data:
            path.write_bytes(data)
            write.clock += 1
            os.utime(path, ns=(write.clock, write.clock))
    rows = [{"file_name": name, "label": file.label, "text": file.caption} for name, file in files.items()]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


write.clock = 10**18


class Counting:
    """`map` that counts the files decoded and the shards written."""

    def __init__(self) -> None:
        self.files, self.shards = 0, 0

    def __call__(self, function, tasks):
        for task in tasks:
            if function is decode_chunk:
                self.files += len(task["files"])
            else:
                self.shards += 1
            yield function(task)


def some(*looks: int, **changed: File) -> dict[str, File]:
    files = {f"{look:03d}.png": File(look, "ab"[look % 2]) for look in looks}
    return files | {name.replace("_", "."): file for name, file in changed.items()}


def test_a_grown_source_shares_what_it_can_and_decodes_what_is_new(tmp_path):
    root, folder = tmp_path / "root", tmp_path / "s"
    first = ingest.shard_dataset(write(folder, some(*range(40))), RECIPE, root)
    before = content(root)
    each = Counting()
    second = ingest.shard_dataset(write(folder, some(*range(46))), RECIPE, root, each=each)
    old, new = manifest.load(first.uri), accounts_for(second.uri, set(some(*range(46))))
    assert each.files == 6
    assert (new.parent, old.parent) == (first.digest, None)
    full = {entry.sha256 for entry in old.shards if entry.pictures == 4}
    assert full <= {entry.sha256 for entry in new.shards}
    assert each.shards == len(new.shards) - len(full)
    split_of = {sample.key: sample.split for sample in samples_of(second.uri)}
    assert all(split_of[sample.key] == sample.split for sample in samples_of(first.uri))
    after = content(root)
    assert {name: after[name] for name in before if not name.startswith("heads/")} == {
        name: data for name, data in before.items() if not name.startswith("heads/")
    }


def test_the_same_state_again_is_the_same_dataset_and_touched_files_too(tmp_path):
    root, folder = tmp_path / "root", tmp_path / "s"
    first = ingest.shard_dataset(write(folder, some(*range(20))), RECIPE, root)
    second = ingest.shard_dataset(write(folder, some(*range(21))), RECIPE, root)
    each = Counting()
    assert ingest.shard_dataset(folder, RECIPE, root, each=each) == second
    assert (each.files, each.shards) == (0, 0)
    for path in folder.glob("*.png"):
        path.touch()
    assert ingest.shard_dataset(folder, RECIPE, root, each=each) == second
    assert each.files == 21
    each = Counting()
    assert ingest.shard_dataset(folder, RECIPE, root, each=each) == second  # the new times are known
    assert each.files == 0
    assert first.digest != second.digest


def test_what_could_not_be_read_is_tried_again_though_it_looks_the_same_to_the_listing(tmp_path):
    """A zip's entries are marked by size and sum, so copying the archive anew changes no mark."""
    root, folder, packed = LocalFolder(tmp_path / "root"), write(tmp_path / "s", some(*range(20))), tmp_path / "s.zip"
    with zipfile.ZipFile(packed, "w") as archive:
        for path in sorted(folder.glob("*.png")):
            archive.write(path, f"k/{path.name}")
        (first, *others) = archive.infolist()
    whole = packed.read_bytes()

    def damage(entries: list[zipfile.ZipInfo]) -> None:
        data = bytearray(whole)
        for entry in entries:
            data[entry.header_offset] ^= 1
        packed.write_bytes(data)

    recipe, each = RECIPE.model_copy(update={"max_rejected": 0.1}), Counting()
    damage([first])
    made = ingest.shard_dataset(packed, recipe, root, each=each)
    assert (made.rejected, each.files) == (1, 20)
    assert dry_run(packed, recipe, root).to_decode == 1
    assert ingest.shard_dataset(packed, recipe, root, each=each) == made
    assert each.files == 21
    packed.write_bytes(whole)
    assert ingest.shard_dataset(packed, recipe, root, each=each).rejected == 0
    assert (each.files, dry_run(packed, recipe, root).to_decode) == (22, 0)
    damage(others)
    with pytest.raises(TooManyRejected):
        ingest.shard_dataset(packed, recipe, tmp_path / "other")
    packed.write_bytes(whole)
    again = ingest.shard_dataset(packed, recipe, tmp_path / "other")
    assert (again.images + again.holdout, again.rejected) == (20, 0)


def test_another_caption_or_label_rewrites_the_sample_and_decodes_nothing(tmp_path):
    root, folder, files = tmp_path / "root", tmp_path / "s", some(*range(30))
    first = ingest.shard_dataset(write(folder, files), RECIPE, root)
    name = next(s.facts["source"] for s in samples_of(first.uri) if s.split == "train")
    files[name] = files[name]._replace(caption="now with words", label="Aardvark")
    each = Counting()
    second = ingest.shard_dataset(write(folder, files), RECIPE, root, each=each)
    assert each.files == 0
    assert second.classes == (*first.classes, "Aardvark")  # new classes come last: the others keep their index
    sample = next(s for s in samples_of(second.uri) if s.facts["source"] == name)
    assert (sample.caption, sample.label, sample.split) == ("now with words", 2, "train")
    assert np.array_equal(decode_png(sample.image), pixels(files[name].look))
    accounts_for(second.uri, set(files))


def test_what_leaves_is_gone_and_its_duplicate_takes_its_place_in_its_split(tmp_path):
    root, folder = tmp_path / "root", tmp_path / "s"
    files = some(*range(30), z1_png=File(3, "a"), z2_png=File(3, "b"))
    first = ingest.shard_dataset(write(folder, files), RECIPE, root)
    (was,) = (s for s in samples_of(first.uri) if s.facts["source"] == "003.png")
    del files["003.png"], files["004.png"]
    each = Counting()
    second = ingest.shard_dataset(write(folder, files), RECIPE, root, each=each)
    assert each.files == 0  # the pixels are in the parent's shards
    accounts_for(second.uri, set(files))
    (now,) = (s for s in samples_of(second.uri) if s.key == was.key)
    assert (now.facts["source"], now.split, now.image) == ("z1.png", was.split, was.image)
    files |= some(3)  # it comes back, and comes first by name: the one that is kept stays
    third = ingest.shard_dataset(write(folder, files), RECIPE, root)
    assert next(s for s in samples_of(third.uri) if s.key == was.key) == now
    assert files_of(third.uri)["003.png"]["kind"] == "duplicate"


def test_a_version_without_pictures_fails_clearly_and_leaves_the_last(tmp_path):
    root, folder = tmp_path / "root", tmp_path / "s"
    first = ingest.shard_dataset(write(folder, some(*range(10))), RECIPE, root)
    write(folder, {f"{i}.png": File(DAMAGED) for i in range(10)})
    with pytest.raises(TooManyRejected, match="10 of 10 files"):
        ingest.shard_dataset(folder, RECIPE, root)
    write(folder, {})
    with pytest.raises(BadSource, match="no pictures"):
        ingest.shard_dataset(folder, RECIPE, root)
    assert ingest.shard_dataset(write(folder, some(*range(11))), RECIPE, root).images
    assert manifest.verify(first.uri)


def test_when_all_that_was_held_out_is_gone_training_pictures_are_not_held_out_instead(tmp_path):
    root, folder = tmp_path / "root", tmp_path / "s"
    files = some(*range(12))
    first = ingest.shard_dataset(write(folder, files), RECIPE, root)
    for sample in samples_of(first.uri):
        if sample.split == "holdout":
            del files[sample.facts["source"]]
    with pytest.raises(BadSource, match="what was trained on stays in training"):
        ingest.shard_dataset(write(folder, files), RECIPE, root)


def test_fresh_reads_all_and_gives_what_a_new_root_gives(tmp_path):
    root, folder = tmp_path / "root", tmp_path / "s"
    ingest.shard_dataset(write(folder, some(*range(20))), RECIPE, root)
    write(folder, some(*range(3, 25)))
    each = Counting()
    fresh = ingest.shard_dataset(folder, RECIPE, root, fresh=True, each=each)
    assert each.files == 22
    assert fresh.digest == ingest.shard_dataset(folder, RECIPE, tmp_path / "other").digest
    assert ingest.shard_dataset(folder, RECIPE, root) == fresh  # versions go on from it
    assert manifest.load(fresh.uri).parent is None


def test_a_removed_dataset_is_made_anew_and_a_lost_list_is_named(tmp_path):
    root, folder = tmp_path / "root", tmp_path / "s"
    first = ingest.shard_dataset(write(folder, some(*range(20))), RECIPE, root)
    whole = identity(first.uri)
    listed = Path(first.uri, versions.FILES)
    data = listed.read_bytes()
    assert lint(opened(first.uri)) == []
    for damage in (data[: len(data) // 2], data[:-40] + bytes(40), data[:40] + b"\xff" * 40 + data[80:], None):
        listed.write_bytes(damage) if damage else listed.unlink()
        assert [Path(finding.place).name for finding in lint(opened(first.uri))] == ([listed.name] if damage else [])
        with pytest.raises(ValueError, match=r"files.jsonl.gz is (damaged|missing).*--fresh"):
            ingest.shard_dataset(write(folder, some(*range(21))), RECIPE, root)
    shutil.rmtree(first.uri)
    for entry in whole[1]:
        (root / entry).write_bytes(b"damaged")
    again = ingest.shard_dataset(write(folder, some(*range(20))), RECIPE, root)
    assert identity(again.uri) == whole


@pytest.mark.parametrize("data", [b"", b"{bad", b'{"source": 1}'])
def test_a_damaged_note_of_the_newest_version_is_named_and_can_be_removed(tmp_path, data):
    source, root = write(tmp_path / "s", some(*range(12))), tmp_path / "root"
    first = ingest.shard_dataset(source, RECIPE, root)
    (note,) = (root / "heads").iterdir()
    note.write_bytes(data)
    with pytest.raises(ValueError, match=rf"{note.name}.* is damaged .*: remove it") as error:
        ingest.shard_dataset(source, RECIPE, root)
    assert "\n" not in str(error.value)
    note.unlink()
    assert ingest.shard_dataset(source, RECIPE, root).digest == first.digest


def test_another_limit_of_damage_is_obeyed_and_decodes_nothing(tmp_path):
    root, folder = tmp_path / "root", tmp_path / "s"
    first = ingest.shard_dataset(write(folder, some(*range(20), x_png=File(DAMAGED))), RECIPE, root)
    each = Counting()
    with pytest.raises(TooManyRejected, match="1 of 21 files"):
        ingest.shard_dataset(folder, RECIPE.model_copy(update={"max_rejected": 0.01}), root, each=each)
    second = ingest.shard_dataset(folder, RECIPE.model_copy(update={"max_rejected": 0.5}), root, each=each)
    assert each.files == 0
    assert manifest.load(second.uri).shards == manifest.load(first.uri).shards


def test_damage_in_a_parents_shard_is_named_and_not_passed_on(tmp_path):
    root, folder = tmp_path / "root", tmp_path / "s"
    first = ingest.shard_dataset(write(folder, some(*range(20))), RECIPE, root)
    entry = next(entry for entry in manifest.load(first.uri).shards if entry.pictures < 4)
    data = (root / entry.tar).read_bytes()
    row = next(
        row
        for row in files_of(first.uri).values()
        if row.get("sample")
        and row["image"]
        and entry.tar.endswith(manifest.load(first.uri).shards[row["shard"]].sha256 + ".tar")
    )
    at = row["image"][0] + 50
    (root / entry.tar).write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    write(folder, some(*range(21)))
    with pytest.raises(ValueError, match=rf"{entry.sha256}.tar has other bytes .*`diffusion shard`"):
        ingest.shard_dataset(folder, RECIPE, root)
    (root / entry.tar).unlink()
    shutil.rmtree(first.uri)  # as it says
    accounts_for(ingest.shard_dataset(folder, RECIPE, root).uri, set(some(*range(21))))


@pytest.mark.parametrize("file", ["tar", "index"])
def test_damage_of_equal_length_in_a_shard_that_is_shared_is_named_and_not_passed_on(tmp_path, file):
    root, folder = tmp_path / "root", tmp_path / "s"
    first = manifest.load(ingest.shard_dataset(write(folder, some(*range(20))), RECIPE, root).uri)
    full = [entry for entry in first.shards if entry.pictures == RECIPE.shard_size]
    (read,) = versions.drawn(full, first.digest)
    entry = read if file == "tar" else next(entry for entry in full if entry != read)
    spoilt = root / getattr(entry, file)
    data = spoilt.read_bytes()
    spoilt.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    each = Counting()
    with pytest.raises(ValueError, match=rf"{spoilt.name} (has|differs).*sha256.*`diffusion shard`"):
        ingest.shard_dataset(write(folder, some(*range(21))), RECIPE, root, each=each)
    spoilt.write_bytes(data)
    assert manifest.load(ingest.shard_dataset(folder, RECIPE, root, each=each).uri).parent == first.digest
    assert each.files == 1


@given(st.lists(st.integers(1, 10**10), min_size=1, max_size=200))
def test_of_shared_shards_a_part_is_read_another_for_each_version(sizes):
    shards = [
        manifest.ShardEntry(split="train", pictures=1, bytes=size, sha256=f"{n:064x}", index_sha256="")
        for n, size in enumerate(sizes)
    ]
    read = versions.drawn(shards, "a" * 64)
    assert read == versions.drawn(shards[::-1], "a" * 64)
    assert 1 <= len(read) == len(set(read))
    *before, _ = (entry.bytes for entry in read)
    assert sum(before) < min(sum(sizes) / 30, 2**30) <= sum(before) + read[-1].bytes


def test_in_the_long_run_every_shared_shard_is_read():
    shards = [
        manifest.ShardEntry(split="train", pictures=1, bytes=9, sha256=f"{n:064x}", index_sha256="") for n in range(30)
    ]
    assert {entry for parent in range(300) for entry in versions.drawn(shards, f"{parent:064x}")} == set(shards)
    assert versions.drawn([], "a" * 64) == []


names = st.sampled_from([f"{i:02d}.png" for i in range(14)])
looks = st.integers(DAMAGED, 11)
kinds = st.builds(File, looks, st.sampled_from("abc"), st.sampled_from(["", "words"]))
states = st.dictionaries(names, kinds, min_size=1, max_size=14)


@given(st.lists(states, min_size=1, max_size=4), st.integers(1, 5))
@settings(max_examples=15, deadline=None)
def test_any_history_accounts_for_every_file_keeps_splits_and_shares_what_it_may(history, shard_size):
    recipe = RECIPE.model_copy(update={"shard_size": shard_size})
    with tempfile.TemporaryDirectory() as name:
        folder, root, twin = Path(name, "s"), Path(name, "root"), Path(name, "twin")
        last: DatasetRef | None = None
        for state in history:
            write(folder, state)
            before = content(root) if root.exists() else {}
            try:
                ref = ingest.shard_dataset(folder, recipe, root)
            except (BadSource, TooManyRejected) as error:
                with pytest.raises(type(error)):
                    ingest.shard_dataset(folder, recipe, twin, each=shuffled_each)
                continue
            same = ingest.shard_dataset(folder, recipe, twin, each=shuffled_each)
            assert same.digest == ref.digest
            assert side_files(same.uri) == side_files(ref.uri)
            made = accounts_for(ref.uri, set(state))
            _matches(ref, state)
            for split in ("train", "holdout"):
                assert {entry.pictures for entry in made.entries(split)[:-1]} <= {shard_size}
            after = content(root)
            assert all(after[path] == data for path, data in before.items() if path.startswith(("shards", "datasets")))
            if last is not None and last != ref:
                assert made.parent == last.digest
                _goes_on(last, ref, shard_size)
            last = ref


def _matches(ref: DatasetRef, state: dict[str, File]) -> None:
    """Each sample is its file's picture, label and caption; each look is there once; each damaged file has its reason."""
    samples, files = samples_of(ref.uri), files_of(ref.uri)
    for sample in samples:
        file = state[sample.facts["source"]]
        assert np.array_equal(decode_png(sample.image), pixels(file.look))
        assert (sample.facts["label"], sample.caption) == (file.label, file.caption)
    seen = Counter(state[sample.facts["source"]].look for sample in samples)
    assert seen == Counter({file.look for file in state.values()} - {DAMAGED})
    assert {name for name, file in state.items() if file.look == DAMAGED} == {
        name for name, row in files.items() if row.get("kind") not in (None, "duplicate")
    }


def _goes_on(old: DatasetRef, new: DatasetRef, shard_size: int) -> None:
    """Pictures keep their split, classes their index; a full shard with all its samples as they were is shared."""
    before, after = samples_of(old.uri), samples_of(new.uri)
    splits = {sample.key: sample.split for sample in before}
    assert all(splits.get(sample.key, sample.split) == sample.split for sample in after)
    assert new.classes[: len(old.classes)] == old.classes
    as_they_were = {sample[2:] for sample in _hashable(after)}
    shards = {entry.sha256 for entry in manifest.load(new.uri).shards}
    for entry in manifest.load(old.uri).shards:
        inside = [sample for sample in _hashable(before) if sample[1] == entry.sha256]
        if entry.pictures == shard_size and all(sample[2:] in as_they_were for sample in inside):
            assert entry.sha256 in shards


def _hashable(samples) -> list[tuple]:
    return [(*sample[:4], json.dumps(sample.facts, sort_keys=True), *sample[5:]) for sample in samples]
