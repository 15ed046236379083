"""The manifest: an identity that depends on the data and on nothing else, and lies that are noticed."""

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from diffusion.data import manifest
from diffusion.data.datasets import find
from diffusion.data.manifest import Manifest, Processing, ShardEntry
from diffusion.store.storage import open_storage

ENTRY = ShardEntry(split="train", pictures=5, bytes=9, sha256="ab" * 32, index_sha256="cd" * 32)
MADE = Manifest(
    resolution=16,
    classes=("a", "b"),
    train_counts=(2, 3),
    holdout_counts=(1, 1),
    shards=(ENTRY, ENTRY.model_copy(update={"sha256": "12" * 32, "split": "holdout", "pictures": 2})),
    processing=Processing(background="#ffffff"),
    recipe_digest="ef" * 32,
    files=10,
    set_aside={"duplicate": 2, "empty": 1},
)


def test_facts(tmp_path):
    assert (MADE.images, MADE.holdout, MADE.rejected) == (5, 2, 1)
    assert (MADE.counts("train"), MADE.counts("holdout")) == ((5,), (2,))
    ref = MADE.ref(str(tmp_path))
    assert (ref.digest, ref.images, ref.holdout, ref.rejected) == (MADE.digest, 5, 2, 1)


def published(tmp_path) -> str:
    return manifest.publish(MADE, open_storage(tmp_path))


def test_publish_and_load_and_digest(tmp_path):
    uri = published(tmp_path)
    assert uri == f"{tmp_path}/datasets/{MADE.digest[:16]}"
    assert manifest.load(uri) == manifest.load(Path(uri), digest=MADE.digest) == MADE
    assert manifest.load(uri).digest == MADE.digest
    assert str(tmp_path) not in Path(uri, "manifest.json").read_text()
    assert manifest.root_of(uri).uri == manifest.root_of(uri + "/").uri == str(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"classes": ("a", "c")},
        {"processing": Processing(background="#000000")},
        {"shards": (ENTRY.model_copy(update={"sha256": "00" * 32}), MADE.shards[1])},
        {"recipe_digest": "00" * 32},
        {"train_counts": (3, 2)},
    ],
)
def test_every_fact_is_in_the_digest(change):
    assert MADE.model_copy(update=change).digest != MADE.digest


def test_manifests_that_contradict_themselves_are_refused():
    for change in ({"train_counts": (2, 4)}, {"classes": ("a",)}, {"files": 11}, {"unknown": 1}):
        with pytest.raises(ValidationError):
            Manifest.model_validate({**MADE.model_dump(), **change})


def test_missing_changed_and_damaged_datasets_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"holds no dataset.*`diffusion shard"):
        manifest.load(tmp_path)
    uri = published(tmp_path)
    with pytest.raises(ValueError, match="is asked for"):
        manifest.load(uri, digest="00" * 32)
    with pytest.raises(ValueError, match=r"shards/ab/(ab){32}.tar is missing.*`diffusion shard`"):
        manifest.verify(uri)
    (tmp_path / ENTRY.tar).parent.mkdir(parents=True)
    (tmp_path / ENTRY.tar).write_bytes(b"12345678")
    with pytest.raises(ValueError, match="has 8 bytes instead of 9"):
        manifest.verify(uri)
    (tmp_path / ENTRY.tar).write_bytes(b"123456789")
    with pytest.raises(ValueError, match=r"shards/ab/(ab){32}.npy is missing"):
        manifest.verify(uri)
    document = json.loads(Path(uri, "manifest.json").read_text())
    Path(uri, "manifest.json").write_text(json.dumps({**document, "resolution": 2 * document["resolution"]}))
    for ref in (MADE.digest[:6], uri):
        with pytest.raises(ValueError, match=f"its folder is named for another.*remove {uri} and make it again"):
            find(open_storage(tmp_path), ref)
    Path(uri, "manifest.json").write_text(json.dumps({**document, "files": 99}))
    with pytest.raises(ValueError, match="is damaged"):
        manifest.load(uri)
