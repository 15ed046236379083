"""Sharding as a whole: same input, same bytes; every file accounted for; damage set aside; a budget that stops."""

import io
import json
import os
import random
import shutil
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffusion.data import catalogue, ingest, manifest, quarantine
from diffusion.data.images import decode_png
from diffusion.data.pack import decode_chunk
from diffusion.data.quarantine import TooManyRejected
from diffusion.recipe import ShardRecipe
from diffusion.store.storage import open_storage
from tests.published import accounts_for, content, identity, samples_of

RECIPE = ShardRecipe(resolution=32, shard_size=16, holdout=0.2)


def test_every_picture_is_in_one_split_with_its_facts(emoji_folder, tmp_path):
    seen = []
    ref = ingest.shard_dataset(emoji_folder, RECIPE, tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (60, 60)
    assert ref.classes == ("flags", "food-drink", "smileys-emotion")
    assert Path(ref.uri) == tmp_path / "datasets" / ref.digest[:16]
    rows = {(r := json.loads(line))["file_name"]: r for line in (emoji_folder / "metadata.jsonl").open()}
    made = accounts_for(ref.uri, set(rows))
    assert manifest.verify(ref.uri, digest=ref.digest) == made
    assert all(entry.pictures == 16 for entry in made.entries("train")[:-1])
    samples = samples_of(ref.uri)
    for split, count in (("train", ref.images), ("holdout", ref.holdout)):
        keys = [sample.key for sample in samples if sample.split == split]
        assert keys == sorted(keys)  # by content: classes are mixed
        assert len(keys) == count
    for sample in samples:
        row = rows[sample.facts["source"]]
        assert sample.facts["captions"] == [[row["text"], 1.0]]
        assert (sample.caption, ref.classes[sample.label]) == (row["text"], row["label"])
        assert sample.facts["metadata"] == {key: row[key] for key in ("keywords", "subcategory")}
        original = emoji_folder / sample.facts["source"]
        assert sample.facts["file_sha256"] == sha256(original.read_bytes()).hexdigest()
        assert (sample.facts["width"], sample.facts["height"]) == Image.open(original).size
    assert {path.name for path in tmp_path.iterdir()} == {"datasets", "heads", "shards"}


def test_webdataset_reads_the_shards(emoji_folder, tmp_path):
    import webdataset as wds

    ref = ingest.shard_dataset(emoji_folder, RECIPE, tmp_path)
    tars = [str(tmp_path / entry.tar) for entry in manifest.load(ref.uri).shards]
    read = list(wds.WebDataset(tars, shardshuffle=False))
    assert [(row["__key__"], row["png"]) for row in read] == [(s.key, s.image) for s in samples_of(ref.uri)]


def test_pictures_are_what_an_independent_reading_gives(emoji_folder, tmp_path):
    """The emoji, composited by hand in floating point at their own size."""
    ref = ingest.shard_dataset(emoji_folder, ShardRecipe(resolution=64, background="#204060"), tmp_path)
    for sample in samples_of(ref.uri):
        rgba = np.asarray(Image.open(emoji_folder / sample.facts["source"]).convert("RGBA")).astype(float)
        alpha = rgba[..., 3:] / 255
        expected = rgba[..., :3] * alpha + np.array([0x20, 0x40, 0x60]) * (1 - alpha)
        assert np.abs(decode_png(sample.image) - expected).max() <= 1


def shuffled_each(function, tasks):
    """Several workers whose answers come in any order."""
    results = list(ThreadPoolExecutor(3).map(function, tasks))
    random.Random(1).shuffle(results)
    return results


def side_files(uri: str) -> dict[str, bytes]:
    """What lies beside the manifest, and it; but for the report, which has the time."""
    return {name: data for name, data in content(Path(uri)).items() if name != "report.json"}


def in_small_chunks(monkeypatch, files: int = 7) -> None:
    monkeypatch.setattr(ingest, "_CHUNK_FILES", files)


def test_same_input_same_bytes_for_any_workers_listing_chunks_and_container(emoji_folder, tmp_path, monkeypatch):
    first = ingest.shard_dataset(emoji_folder, RECIPE, tmp_path / "one")
    in_small_chunks(monkeypatch)
    second = ingest.shard_dataset(emoji_folder, RECIPE, tmp_path / "two", each=shuffled_each)
    assert side_files(second.uri) == side_files(first.uri)
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
        assert identity(other.uri) == identity(first.uri)


def test_published_is_reused_never_rewritten_and_damage_is_noticed(emoji_folder, tmp_path):
    first = ingest.shard_dataset(emoji_folder, RECIPE, tmp_path)
    before = {path: path.stat().st_ino for path in tmp_path.rglob("*") if path.is_file()}
    assert ingest.shard_dataset(emoji_folder, RECIPE, tmp_path) == first
    assert ingest.shard_dataset(emoji_folder, RECIPE, tmp_path, fresh=True) == first
    after = {path: path.stat().st_ino for path in tmp_path.rglob("*") if path.is_file()}
    heads = {path for path in before if path.parent.name == "heads"}
    shards = {
        path for path in before if path.parent.parent.name == "shards"
    }  # put again by `fresh`, with the same bytes
    assert {path: node for path, node in after.items() if path not in heads | shards} == {
        path: node for path, node in before.items() if path not in heads | shards
    }
    lost = tmp_path / manifest.load(first.uri).shards[0].tar
    whole = lost.read_bytes()
    lost.unlink()
    with pytest.raises(ValueError, match=r"is missing: remove .* and make it again with `diffusion shard`"):
        ingest.shard_dataset(emoji_folder, RECIPE, tmp_path)
    shutil.rmtree(first.uri)  # as it says
    assert ingest.shard_dataset(emoji_folder, RECIPE, tmp_path) == first
    assert lost.read_bytes() == whole


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
        {s.key for s in samples_of(ingest.shard_dataset(emoji_folder, recipe, tmp_path).uri) if s.split == "holdout"}
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
    assert side_files(shuffled.uri) == side_files(ref.uri)  # also which of the duplicates is kept
    folders = [tmp_path / name / quarantine.place_of(ref.digest) for name in ("store", "shuffled")]
    assert content(folders[0]) == content(folders[1])
    assert ref.rejected == 4
    assert (ref.images, ref.holdout) == (clean.images, clean.holdout)
    assert ref.classes == clean.classes  # zebra held only copies
    assert ref.digest != clean.digest
    made = manifest.load(ref.uri)
    aside = {"duplicate": 2, "empty": 1, "not a picture": 1, "truncated": 2}
    already = manifest.load(clean.uri).set_aside.get("duplicate", 0)
    assert made.set_aside == aside | {"duplicate": 2 + already}
    assert made.shards == manifest.load(clean.uri).shards
    root = open_storage(tmp_path / "store")
    files = list(quarantine.entries(root, ref.digest))
    assert Counter(file.kind for file in files) == made.set_aside
    for file in files:
        if file.kind == "duplicate":
            assert file.tar is None
            if file.name.startswith("zebra"):
                assert "kept as flags; this one says zebra" in file.detail
        else:
            assert quarantine.original(root, file) == (spoilt_folder / file.name).read_bytes()


def test_an_entry_that_a_password_protects_is_set_aside_once_and_not_tried_again(emoji_folder, tmp_path):
    packed, asked = tmp_path / "s.zip", []
    with zipfile.ZipFile(packed, "w") as archive:
        for path in sorted(emoji_folder.rglob("*.png"))[:5]:
            archive.write(path, f"a/{path.name}")
        last = archive.infolist()[-1].filename
    data = bytearray(packed.read_bytes())
    data[data.rfind(last.encode()) - 46 + 8] |= 1  # the directory's flag of an encrypted entry
    packed.write_bytes(data)
    recipe = RECIPE.model_copy(update={"max_rejected": 0.5})
    first = ingest.shard_dataset(packed, recipe, tmp_path / "root")
    assert manifest.load(first.uri).set_aside == {"encrypted": 1}
    again = ingest.shard_dataset(
        packed, recipe, tmp_path / "root", each=lambda function, tasks: asked.extend(tasks) or []
    )
    assert (again, asked) == (first, [])


def test_too_many_bad_files_stop_with_something_to_type_and_leave_them_to_look_at(spoilt_folder, tmp_path):
    recipe, store = RECIPE.model_copy(update={"max_rejected": 0.05}), tmp_path / "store"
    with pytest.raises(TooManyRejected, match=r"(?s)4 of 66 files cannot be used .*max_rejected=0.07") as error:
        ingest.shard_dataset(spoilt_folder, recipe, store)
    kept = next((store / "quarantine").iterdir())
    assert str(kept) in str(error.value)
    names = [path.name for path in kept.iterdir()]
    assert sorted(names) == ["quarantine-000000.tar", "reasons.jsonl"]
    assert not (store / "datasets").exists()
    calls = []

    def counting(function, tasks):
        for task in tasks:
            calls.append(function.__name__)
            yield function(task)

    with pytest.raises(TooManyRejected):  # again, with the quarantine there already
        ingest.shard_dataset(spoilt_folder, recipe, store, each=counting)
    ingest.shard_dataset(spoilt_folder, recipe.model_copy(update={"max_rejected": 0.07}), store, each=counting)
    assert set(calls) == {"pack_shard"}  # nothing was decoded again
    assert not (store / "work").exists()


def test_a_source_without_a_usable_picture_fails_clearly(tmp_path):
    (tmp_path / "s").mkdir()
    for i in range(3):
        (tmp_path / "s" / f"{i}.png").write_bytes(b"not a picture at all")
    for share in (0.1, 0.99):
        with pytest.raises(TooManyRejected, match="3 of 3 files cannot be used"):
            ingest.shard_dataset(tmp_path / "s", RECIPE.model_copy(update={"max_rejected": share}), tmp_path / "store")


def test_nothing_to_hold_out_and_one_class(tmp_path):
    (tmp_path / "one").mkdir()
    for i in range(3):
        Image.new("RGB", (20, 30), (i * 50, 0, 0)).save(tmp_path / "one" / f"{i}.jpg")
    ref = ingest.shard_dataset(tmp_path / "one", RECIPE.model_copy(update={"holdout": 0}), tmp_path / "store")
    assert (ref.images, ref.holdout, ref.classes) == (3, 0, ("picture",))
    some = ingest.shard_dataset(tmp_path / "one", RECIPE, tmp_path / "store")
    assert (some.images, some.holdout) == (2, 1)


def test_a_failed_run_publishes_nothing_and_the_next_goes_on(emoji_folder, tmp_path, monkeypatch):
    in_small_chunks(monkeypatch)
    calls = Counter()

    def failing(function, tasks):
        for number, task in enumerate(tasks):
            if number == 4 and function is decode_chunk:
                raise OSError("no space left")
            calls[function.__name__] += 1
            yield function(task)

    with pytest.raises(OSError, match="no space"):
        ingest.shard_dataset(emoji_folder, RECIPE, tmp_path, each=failing)
    assert not (tmp_path / "datasets").exists()
    with pytest.raises(OSError, match="no space"):  # in the middle of the rest
        ingest.shard_dataset(emoji_folder, RECIPE, tmp_path, each=failing)
    seen = []
    ref = ingest.shard_dataset(emoji_folder, RECIPE, tmp_path, each=failing, progress=lambda *state: seen.append(state))
    assert seen[0][0] > 56  # 4 + 4 chunks of 7 are not decoded again
    assert calls["decode_chunk"] == 9
    clean = ingest.shard_dataset(emoji_folder, RECIPE, tmp_path / "clean")
    assert ref.digest == clean.digest
    assert identity(ref.uri) == identity(clean.uri)


def test_two_processes_do_not_work_in_one_folder(emoji_folder, tmp_path):
    def interrupted(function, tasks):
        with pytest.raises(catalogue.Busy, match=rf"process {os.getpid()} shards this source"):
            ingest.shard_dataset(emoji_folder, RECIPE, tmp_path)
        return map(function, tasks)

    ingest.shard_dataset(emoji_folder, RECIPE, tmp_path, each=interrupted)


def test_a_full_disk_is_named_and_the_next_call_goes_on(emoji_folder, tmp_path, monkeypatch):
    connect, connections = catalogue.sqlite3.connect, {}

    def watched(path, **settings):
        connections[Path(path).name] = connect(path, **settings)
        return connections[Path(path).name]

    def on_a_small_disk(function, tasks):
        connections["catalogue.db"].execute("PRAGMA max_page_count = 1")
        return map(function, tasks)

    monkeypatch.setattr(catalogue.sqlite3, "connect", watched)
    with pytest.raises(OSError, match=r"no room for the catalogue in .*: free some"):
        ingest.shard_dataset(emoji_folder, RECIPE, tmp_path, each=on_a_small_disk)
    assert ingest.shard_dataset(emoji_folder, RECIPE, tmp_path).images


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


def test_the_report_counts_what_is_there(spoilt_folder, tmp_path):
    ref = ingest.shard_dataset(spoilt_folder, RECIPE, tmp_path / "store")
    report, samples = json.loads(Path(ref.uri, "report.json").read_text()), samples_of(ref.uri)
    assert (report["files"], report["kept"], report["holdout"]) == (66, len(samples), ref.holdout)
    assert report["set_aside"] == manifest.load(ref.uri).set_aside
    assert report["formats"] == {".png": 65, ".webp": 1}
    assert report["captions"] == {"pictures_with": sum(bool(s.caption) for s in samples), "several": 0}
    assert report["sides"] == {"64": len(samples)}
    assert report["aspects"] == {"1": len(samples)}
    assert report["examples"]["empty"] == [["flags/empty.png", "the file has no bytes"]]
    sizes = [path.stat().st_size for path in spoilt_folder.rglob("*") if path.is_file() and path.suffix != ".jsonl"]
    assert report["bytes"]["source"] == sum(sizes)
