"""What is set aside can be had back: people release what a policy held back, and retry what a decoder refused."""

import hashlib
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffusion.data import ingest, manifest, pack, quarantine
from diffusion.data.datasets import opened
from diffusion.data.images import decode_all
from diffusion.data.lint import lint
from diffusion.data.pictures.bad_picture import BadPicture
from diffusion.data.report import write_report
from diffusion.recipe import ShardRecipe
from diffusion.store.storage import LocalFolder
from tests.published import accounts_for, content, samples_of
from tests.test_versions import Counting

RECIPE = ShardRecipe(resolution=16, shard_size=4, holdout=0.2, min_side=12, max_aspect=2, max_rejected=0.9)


@pytest.fixture
def source(tmp_path) -> Path:
    """Twelve good pictures, two that are too small, one too long, and a damaged one, with captions."""
    folder, random, lines = tmp_path / "s", np.random.default_rng(0), []
    sizes = {f"good-{i:02d}.png": (16, 20) for i in range(12)}
    sizes |= {"small-1.png": (8, 8), "small-2.png": (10, 11), "long.png": (16, 60)}
    for name, size in sizes.items():
        path = folder / "ab"[len(lines) % 2] / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)
        lines.append(f'{{"file_name": "{path.relative_to(folder)}", "text": "caption of {name}"}}\n')
    (folder / "a" / "cut.png").write_bytes((folder / "a" / "good-00.png").read_bytes()[:-50])
    (folder / "metadata.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture
def root(tmp_path) -> LocalFolder:
    return LocalFolder(tmp_path / "root")


def names_of(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*.png")}


def aside(root: LocalFolder, digest: str) -> dict[str, quarantine.SetAside]:
    return {Path(file.name).name: file for file in quarantine.entries(root, digest)}


def test_released_files_come_from_quarantine_and_pass_from_then_on(source, root, tmp_path):
    first = ingest.shard_dataset(source, RECIPE, root)
    files = aside(root, first.digest)
    assert {name: file.kind for name, file in files.items()} == {
        "small-1.png": "too small",
        "small-2.png": "too small",
        "long.png": "too elongated",
        "cut.png": "truncated",
    }
    before, names = content(root.folder), names_of(source)
    pixels = decode_all(quarantine.original(root, files["small-1.png"]))
    gone = source.rename(tmp_path / "gone")  # not asked
    wanted = [files[name].sha256 for name in ("small-1.png", "long.png")]
    second = ingest.release(root, first.digest, wanted)
    made = accounts_for(second.uri, names)
    assert (made.parent, made.released) == (first.digest, tuple(sorted(wanted)))
    assert (second.images + second.holdout, second.rejected) == (first.images + first.holdout + 2, 2)
    by_name = {Path(s.facts["source"]).name: s for s in samples_of(second.uri)}
    assert by_name["small-1.png"].caption == "caption of small-1.png"
    assert (by_name["small-1.png"].facts["width"], pixels.shape) == (8, (8, 8, 3))
    splits = {s.key: s.split for s in samples_of(second.uri)}
    assert all(splits[s.key] == s.split for s in samples_of(first.uri))
    after = content(root.folder)
    assert all(after[name] == data for name, data in before.items() if not name.startswith("heads/"))
    assert not (root.folder / "work").exists()
    # the source goes on from there: the same state is the released version, and children inherit
    gone.rename(source)
    assert ingest.shard_dataset(source, RECIPE, root) == second
    Image.new("RGB", (20, 20), "#123456").save(source / "a" / "new.png")
    third = manifest.load(ingest.shard_dataset(source, RECIPE, root).uri)
    assert (third.parent, third.released) == (second.digest, made.released)
    assert third.set_aside == made.set_aside
    fresh = ingest.shard_dataset(source, RECIPE, root, fresh=True)  # begins anew, so with nothing released
    assert manifest.load(fresh.uri).set_aside == {"too elongated": 1, "too small": 2, "truncated": 1}


def test_release_is_the_same_bytes_whether_interrupted_or_not(source, root, tmp_path):
    first = ingest.shard_dataset(source, RECIPE, root)
    twin = LocalFolder(tmp_path / "twin")
    assert ingest.shard_dataset(source, RECIPE, twin).digest == first.digest
    wanted = [file.sha256 for file in aside(root, first.digest).values() if file.kind == "too small"]

    def failing(function, tasks):
        for task in tasks:
            yield function(task)
            raise OSError("interrupted")

    with pytest.raises(OSError, match="interrupted"):
        ingest.release(root, first.digest, [*wanted, aside(root, first.digest)["long.png"].sha256], each=failing)
    assert ingest.release(root, first.digest, wanted).digest == ingest.release(twin, first.digest, wanted[::-1]).digest


def test_a_release_in_the_middle_of_a_night_is_not_lost(source, root):
    first = ingest.shard_dataset(source, RECIPE, root)
    (sha256,) = (file.sha256 for file in aside(root, first.digest).values() if file.kind == "too elongated")
    Image.new("RGB", (20, 20), "#123456").save(source / "a" / "new.png")

    def meanwhile(function, tasks):
        ingest.release(root, first.digest, [sha256])
        return map(function, tasks)

    made = manifest.load(ingest.shard_dataset(source, RECIPE, root, each=meanwhile).uri)
    assert made.released == (sha256,)
    assert made.set_aside == {"too small": 2, "truncated": 1}
    accounts_for(f"{root.uri}/{manifest.place_of(made.digest)}", names_of(source))


def test_damage_unknown_files_and_lost_originals_are_not_released(source, root, monkeypatch):
    first = ingest.shard_dataset(source, RECIPE, root)
    with pytest.raises(ValueError, match=r"a/cut.png.*truncated.*cannot be released.*quarantine retry"):
        ingest.release(root, first.digest, [aside(root, first.digest)["cut.png"].sha256])
    with pytest.raises(ValueError, match=r"aaaaaaaaaaaaaaaa is of no file.*quarantine list"):
        ingest.release(root, first.digest, ["a" * 64])
    with pytest.raises(ValueError, match="holds no dataset"):
        ingest.release(root, "b" * 64, ["a" * 64])
    monkeypatch.setattr(quarantine, "MAX_ORIGINALS_BYTES", 0)
    bare = ingest.shard_dataset(source, RECIPE, root.folder.with_name("bare"))
    bare_root = LocalFolder(root.folder.with_name("bare"))
    file = aside(bare_root, bare.digest)["long.png"]
    with pytest.raises(ValueError, match=r"long.png.*listed, but not kept"):
        ingest.release(bare_root, bare.digest, [aside(root, first.digest)["long.png"].sha256, file.sha256])


def test_a_damaged_original_is_told_and_holds_up_no_other(source, root):
    first = ingest.shard_dataset(source, RECIPE, root)
    files = aside(root, first.digest)
    lost = files["long.png"]
    tar = bytearray(root.read(lost.tar))
    tar[lost.offset + lost.bytes // 2] ^= 1
    root.put(lost.tar, bytes(tar))
    (found,) = lint(opened(first.uri))
    assert (found.place, "an original there is lost" in found.what) == (lost.tar, True)
    for again in (lambda: ingest.release(root, first.digest, [lost.sha256]), lambda: ingest.retry(root, first.digest)):
        with pytest.raises(quarantine.DamagedQuarantine, match=r"quarantine-000000.tar has other bytes .* --fresh"):
            again()
    second = ingest.release(root, first.digest, [files["small-1.png"].sha256])
    accounts_for(second.uri, names_of(source))
    write_report(opened(second.uri))
    after = aside(root, second.digest)
    assert (after["long.png"].sha256, after["long.png"].tar) == (lost.sha256, None)
    assert quarantine.original(root, after["small-2.png"]) == quarantine.original(root, files["small-2.png"])
    reasons = root.path(f"{quarantine.place_of(second.digest)}/{quarantine.REASONS}")
    reasons.write_bytes(reasons.read_bytes().replace(b'"too small"', b'"too smalk"'))
    assert [found.place for found in lint(opened(second.uri))] == [
        f"{quarantine.place_of(second.digest)}/reasons.jsonl"
    ]
    root.remove(lost.tar)
    write_report(opened(first.uri))  # without what is lost
    with pytest.raises(quarantine.DamagedQuarantine, match=r"quarantine-000000.tar is missing"):
        quarantine.original(root, files["small-1.png"])


def test_retry_takes_in_what_decodes_now_and_changes_nothing_where_nothing_does(source, root, monkeypatch):
    first = ingest.shard_dataset(source, RECIPE, root)
    each = Counting()
    assert ingest.retry(root, first.digest, each=each) == first
    assert each.files == 4
    whole = (source / "b" / "good-01.png").read_bytes()
    cut = (source / "a" / "cut.png").read_bytes()

    def better(data: bytes) -> np.ndarray:
        if data == cut:  # as a later decoder may read it
            return 255 - decode_all(whole)
        return decode_all(data)

    monkeypatch.setattr(pack.images, "decode_all", better)
    second = ingest.retry(root, first.digest)
    made = accounts_for(second.uri, names_of(source))
    assert made.parent == first.digest
    assert made.set_aside == {"too elongated": 1, "too small": 2}
    assert ingest.shard_dataset(source, RECIPE, root) == second

    def worse(data: bytes) -> np.ndarray:
        raise BadPicture("damaged", "nothing works")

    monkeypatch.setattr(pack.images, "decode_all", worse)
    each = Counting()
    third = manifest.load(ingest.retry(root, second.digest, each=each).uri)  # what is kept is not looked at again
    assert each.files == 3
    assert third.set_aside == {"damaged": 3}


def test_releasing_from_an_older_version_leaves_the_newest_as_it_is(source, root):
    first = ingest.shard_dataset(source, RECIPE, root)
    Image.new("RGB", (20, 20), "#123456").save(source / "a" / "new.png")
    second = ingest.shard_dataset(source, RECIPE, root)
    branch = ingest.release(root, first.digest, [aside(root, first.digest)["long.png"].sha256])
    assert manifest.load(branch.uri).parent == first.digest
    assert ingest.shard_dataset(source, RECIPE, root) == second


def test_near_duplicates_are_set_aside_come_back_when_alone_and_are_released(tmp_path, root):
    """A photograph-like picture, and the same saved as JPEG: which is decoded again when its better is gone."""
    folder, recipe = tmp_path / "near", ShardRecipe(resolution=32, shard_size=4, holdout=0.2, near_duplicates=4)
    folder.mkdir()
    for i in range(8):
        smooth = np.random.default_rng(i).integers(0, 256, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(smooth).resize((64, 64), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    Image.open(folder / "3.png").save(folder / "z.jpg", quality=80)
    first = ingest.shard_dataset(folder, recipe, root)
    assert manifest.load(first.uri).set_aside == {"near duplicate": 1}
    assert first.rejected == 0
    file = aside(root, first.digest)["z.jpg"]
    assert file.detail == "nearly the same picture as 3.png"
    assert quarantine.original(root, file) == (folder / "z.jpg").read_bytes()
    released = ingest.release(root, first.digest, [file.sha256])
    made = accounts_for(released.uri, {*(f"{i}.png" for i in range(8)), "z.jpg"})
    assert (made.set_aside, made.parent) == ({}, first.digest)
    other = tmp_path / "other"
    ingest.shard_dataset(folder, recipe, other)
    (folder / "3.png").unlink()
    each = Counting()
    second = ingest.shard_dataset(folder, recipe, other, each=each)
    assert each.files == 1
    assert "z.jpg" in {s.facts["source"] for s in samples_of(second.uri)}
    accounts_for(second.uri, {path.name for path in folder.iterdir()})


def test_a_file_with_an_unsafe_name_is_kept_as_it_is_and_goes_in_under_no_name(source, root):
    data = (source / "a" / "good-00.png").read_bytes()
    (source / "b" / "line\nend.png").write_bytes(data)
    first = ingest.shard_dataset(source, RECIPE, root)
    (file,) = (file for file in quarantine.entries(root, first.digest) if file.kind == "unsafe name")
    assert quarantine.original(root, file) == data
    assert ingest.retry(root, first.digest) == first
    with pytest.raises(ValueError, match=r"end.png.*control character.*rename it in the source"):
        ingest.release(root, first.digest, [file.sha256])


def test_a_file_is_released_beside_a_copy_of_it_with_an_unsafe_name(source, root):
    small = (source / "a" / "small-1.png").read_bytes()
    (source / "b" / "line\nend.png").write_bytes(small)
    first = ingest.shard_dataset(source, RECIPE, root)
    made = ingest.release(root, first.digest, [hashlib.sha256(small).hexdigest()])
    assert made.images + made.holdout == first.images + first.holdout + 1
    left = {file.name: file.kind for file in quarantine.entries(root, made.digest)}
    assert "a/small-1.png" not in left
    assert [kind for name, kind in left.items() if name.startswith("b/line")] == ["unsafe name"]


def test_what_is_kept_nowhere_is_carried_over(source, root, monkeypatch):
    """Originals beyond the sum that is kept, and one that could not be read, do not hinder the others."""
    (source / "metadata.jsonl").unlink()
    packed, gone = source / "s.zip", (source / "a" / "good-00.png").read_bytes()
    with zipfile.ZipFile(packed, "w") as archive:
        for path in sorted(source.rglob("*.png")):
            archive.write(path, str(path.relative_to(source)))
    packed.write_bytes(packed.read_bytes().replace(gone[-40:], bytes(40), 1))  # its checksum is another
    small = (source / "a" / "small-1.png").stat().st_size
    monkeypatch.setattr(quarantine, "MAX_ORIGINALS_BYTES", small)
    first = ingest.shard_dataset(packed, RECIPE, root)
    before = {file.name: file for file in quarantine.entries(root, first.digest)}
    assert {name: (file.kind, file.tar is None, file.sha256 is None) for name, file in before.items()} == {
        "a/cut.png": ("truncated", True, False),
        "a/good-00.png": ("unreadable", True, True),
        "a/long.png": ("too elongated", True, False),
        "a/small-1.png": ("too small", False, False),
        "b/small-2.png": ("too small", True, False),
    }
    second = ingest.release(root, first.digest, [before.pop("a/small-1.png").sha256])
    assert accounts_for(second.uri, names_of(source)).parent == first.digest
    assert {file.name: file for file in quarantine.entries(root, second.digest)} == before
