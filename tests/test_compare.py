"""Two datasets compared against the lists of pictures they were made of."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion.data.compare import difference
from diffusion.data.datasets import Dataset
from diffusion.data.mix import mix
from diffusion.store.storage import LocalFolder
from tests.made_dataset import Made, published

LABELS = ("birds", "cats", "dogs")
MADE = st.builds(
    Made,
    st.integers(0, 9),
    st.sampled_from(LABELS),
    st.sampled_from(("train", "holdout")),
    st.sampled_from(((), ("a",), ("a", "b"))),
    st.none(),  # the key is that of the pixels
)
PICTURES = st.lists(MADE, min_size=1, max_size=10, unique_by=lambda made: made.look).filter(
    lambda pictures: any(picture.split == "train" for picture in pictures)
)


@settings(max_examples=40, deadline=None)
@given(before=PICTURES, after=PICTURES, sizes=st.tuples(st.integers(1, 4), st.integers(1, 4)))
def test_every_picture_is_accounted_for(tmp_path_factory, before: list[Made], after: list[Made], sizes) -> None:
    root = LocalFolder(tmp_path_factory.mktemp("root"))
    a, b = (published(root, pictures, shard_size=n) for pictures, n in zip((before, after), sizes, strict=True))
    one, two = ({picture.key: picture for picture in pictures} for pictures in (before, after))
    both = sorted(one.keys() & two.keys())
    found = difference(a, b, few=99)
    expected = {
        "added": sorted(two.keys() - one.keys()),
        "removed": sorted(one.keys() - two.keys()),
        "moved": [key for key in both if one[key].split != two[key].split],
        "changed": [key for key in both if (one[key].label, one[key].captions) != (two[key].label, two[key].captions)],
    }
    assert {kind: [key for key, *_ in changes] for kind, changes in found.examples.items()} == expected
    assert {kind: getattr(found, kind) for kind in expected} == {kind: len(keys) for kind, keys in expected.items()}
    assert set(found.added_classes) == {p.label for p in after} - {p.label for p in before}
    assert set(found.removed_classes) == {p.label for p in before} - {p.label for p in after}


@pytest.fixture
def root(tmp_path: Path) -> LocalFolder:
    return LocalFolder(tmp_path)


def test_nothing_differs_from_itself_and_no_shard_is_read(root: LocalFolder) -> None:
    made = published(root, [Made(n) for n in range(9)])
    entries = made.manifest.shards
    for entry in entries:
        root.remove(entry.tar)
        root.remove(entry.index)
    found = difference(made, made)
    assert (found.shared_shards, found.shared_bytes) == (3, sum(entry.bytes for entry in entries))
    assert (found.added, found.removed, found.moved, found.changed, found.facts) == (0, 0, 0, 0, {})


@settings(max_examples=20, deadline=None)
@given(
    versions=st.lists(st.frozensets(st.integers(0, 9), min_size=1), min_size=3, max_size=3, unique=True),
    size=st.integers(1, 4),
)
def test_a_mixture_adds_what_its_other_parts_have_beyond_the_first(tmp_path_factory, versions, size) -> None:
    """Versions of one set: a picture is the same wherever it lies, and may lie in a shared and in another shard."""
    root = LocalFolder(tmp_path_factory.mktemp("root"))
    versions = [[Made(look) for look in sorted(looks)] for looks in versions]
    one, two, three = (published(root, pictures, shard_size=size) for pictures in versions)
    keys = [{picture.key for picture in pictures} for pictures in versions]
    mixed, other = mix(root, [(one, 1), (two, 1)]), mix(root, [(one, 1), (three, 1)])
    for a, b, before, after in (
        (one, mixed, keys[0], keys[0] | keys[1]),
        (mixed, two, keys[0] | keys[1], keys[1]),
        (mixed, other, keys[0] | keys[1], keys[0] | keys[2]),
    ):
        found = difference(a, b, few=99)
        assert [key for key, *_ in found.examples["added"]] == sorted(after - before)
        assert [key for key, *_ in found.examples["removed"]] == sorted(before - after)
        assert (found.moved, found.changed) == (0, 0)


def test_changes_are_told_in_words(root: LocalFolder) -> None:
    a = published(root, [Made(1, "cats"), Made(2, "cats"), Made(3, "dogs", captions=("a",))])
    b = published(root, [Made(1, "dogs"), Made(2, "cats", "holdout"), Made(3, "dogs", captions=("b",)), Made(4)])
    found = difference(a, b)
    told = {source: what for examples in found.examples.values() for _, source, what in examples}
    assert told == {
        "dogs/1.png": 'class cats -> dogs, source "cats/1.png" -> "dogs/1.png"',
        "cats/2.png": "training -> held out",
        "dogs/3.png": 'captions [["a", 1.0]] -> [["b", 1.0]]',
        "cats/4.png": "class cats",
    }
    assert [len(changes) for changes in difference(a, b, few=1).examples.values()] == [1, 0, 1, 1]


def test_the_same_shard_under_other_names_is_another_matter(root: LocalFolder) -> None:
    """Shards hold class indices: equal bytes in a dataset with other names would be other pictures."""
    made = published(root, [Made(1, "cats"), Made(2, "cats")])
    renamed = Dataset(made.uri, made.manifest.model_copy(update={"classes": ("dogs",), "resolution": 8}))
    found = difference(made, renamed)
    assert (found.shared_shards, found.changed, found.facts) == (0, 2, {"resolution": ("16", "8")})
    assert all(what == "class cats -> dogs" for *_, what in found.examples["changed"])


def test_the_same_shard_in_another_split_has_moved(root: LocalFolder) -> None:
    a = published(root, [Made(1), Made(2), Made(3, split="holdout")], shard_size=2)
    b = published(root, [Made(1, split="holdout"), Made(2, split="holdout"), Made(3)], shard_size=2)
    assert {entry.sha256 for entry in a.manifest.shards} == {entry.sha256 for entry in b.manifest.shards}
    found = difference(a, b)
    assert (found.moved, found.shared_shards, found.added, found.removed) == (3, 0, 0, 0)
