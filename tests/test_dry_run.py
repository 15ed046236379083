"""A dry run says what the real one then does, and writes nothing."""

from pathlib import Path

import pytest

from diffusion.data import ingest, manifest
from diffusion.data.dry_run import Changes, dry_run
from diffusion.data.sources import BadSource
from diffusion.recipe import ShardRecipe
from diffusion.store.storage import LocalFolder
from flows.dry_run import told
from tests.flawed_source import GOOD, REASONS, RECIPE, fill, picture

DAMAGE = {"empty": 1, "not a picture": 1, "too elongated": 1, "too small": 2, "truncated": 1}  # duplicates show later


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return fill(tmp_path / "source")


@pytest.fixture
def root(tmp_path: Path) -> LocalFolder:
    return LocalFolder(tmp_path / "root")


def test_with_all_files_in_the_sample_it_foretells_the_dataset(source: Path, root: LocalFolder) -> None:
    found = dry_run(source, RECIPE, root)
    assert list(root.walk()) == []
    assert not root.folder.exists()
    assert (found.changes, found.to_decode, found.sampled.files) == (None, GOOD + len(REASONS), GOOD + len(REASONS))
    assert found.sampled.rejected == DAMAGE
    assert {name: kind for kind, named in found.sampled.examples.items() for name, _ in named} == {
        name: kind for name, kind in REASONS.items() if kind != "duplicate"
    }
    made = manifest.load(ingest.shard_dataset(source, RECIPE, root).uri)
    assert {kind: count for kind, count in made.set_aside.items() if kind != "duplicate"} == DAMAGE
    size = sum(entry.bytes for entry in made.shards)
    assert found.sampled.bytes == pytest.approx(size, rel=0.2)
    lines = told(found, RECIPE)
    assert lines["version"] == "the first of this source with this recipe"
    assert lines["sample"].startswith(f"of {GOOD + 7} files {GOOD + 1} can be used, 1 empty, 1 not a picture")
    assert "1 .jpg, 30 .png" in lines["files"]
    for took, said in ((0.0, "under a second of one core"), (7.0, "about 7.0 s of one core")):
        assert told(found._replace(sampled=found.sampled._replace(seconds=took)), RECIPE)["time"].startswith(said)


def test_against_the_version_before_it_tells_what_is_new_changed_and_gone(source: Path, root: LocalFolder) -> None:
    first = ingest.shard_dataset(source, RECIPE, root)
    before = {found.name: found.mark for found in root.walk()}
    assert dry_run(source, RECIPE, root).changes == Changes(first.digest, 0, 0, 0, GOOD + len(REASONS))
    (source / "cats" / "zz.png").write_bytes(picture(50))
    (source / "dogs" / "01.png").write_bytes(picture(51, 41, 41))
    (source / "dogs" / "03.png").unlink()
    (source / "metadata.jsonl").write_text('{"file_name": "cats/00.png", "text": "a cat"}\n')
    found = dry_run(source, RECIPE, root)
    assert found.changes == Changes(first.digest, 1, 2, 1, GOOD + len(REASONS) - 3)
    assert (found.to_decode, found.sampled.files, found.sampled.rejected) == (2, 2, {})  # a caption costs no decoding
    assert "1 new, 2 changed, 1 gone" in told(found, RECIPE)["version"]
    assert told(found, RECIPE)["captions"] == "1 pictures have one, 0 of them several"
    (source / "metadata.jsonl").write_text(
        '{"file_name": "cats/00.png", "text": "a\\tcat\\n"}\n{"file_name": "dogs/01.png", "text": "a \\u001b[2J dog"}\n'
    )
    said = told(dry_run(source, RECIPE, root), RECIPE)["captions"]
    assert said == "2 pictures have one, 0 of them several; 1 with control characters, which stay in them"
    assert {found.name: found.mark for found in root.walk()} == before
    assert dry_run(source, RECIPE, root, fresh=True).changes is None
    other = dry_run(source, RECIPE.model_copy(update={"resolution": 16}), root)
    assert (other.changes, other.to_decode) == (None, GOOD + len(REASONS))


def test_a_part_is_the_same_part_every_time_and_speaks_for_all(source: Path, root: LocalFolder) -> None:
    seen = []
    one, two = (
        dry_run(source, RECIPE, root, sample=10, progress=lambda done, total: seen.append((done, total)))
        for _ in range(2)
    )
    assert one.sampled._replace(seconds=0, reading=0) == two.sampled._replace(seconds=0, reading=0)
    assert seen == [(n + 1, 10) for n in range(10)] * 2
    assert one.of_all(one.sampled.files) == one.to_decode == GOOD + len(REASONS)
    strict = told(one._replace(sampled=one.sampled._replace(rejected={"empty": 5})), ShardRecipe())
    assert "50.0% of the sample cannot be used, shard.max_rejected allows 10.0%" in strict["refused"]
    assert strict["expected"] == f"about {round(5 * one.to_decode / 10)} of {one.to_decode} files set aside"


def test_a_source_that_is_none_is_refused(tmp_path: Path, root: LocalFolder) -> None:
    with pytest.raises(BadSource, match="does not exist"):
        dry_run(tmp_path / "none", RECIPE, root)
