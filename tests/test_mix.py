"""Mixtures: nothing held out is trained on, nothing else is lost, and what can be shared is."""

import json
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from diffusion.data import manifest
from diffusion.data.datasets import Dataset
from diffusion.data.images import encode_png
from diffusion.data.lint import lint
from diffusion.data.manifest import Processing, Split
from diffusion.data.mix import HELD_ELSEWHERE, mix
from diffusion.data.preview import preview
from diffusion.data.shards import read_index
from diffusion.store.storage import LocalFolder
from tests.made_dataset import Made, published

MADE = st.builds(
    Made,
    look=st.integers(0, 7),
    label=st.sampled_from(("birds", "cats", "dogs")),
    split=st.sampled_from(("train", "train", "holdout")),
    original=st.one_of(st.none(), st.integers(0, 7)),
)


def distinct(pictures: list[Made]) -> bool:
    """As in a dataset: no original and no look twice, and something to train on."""
    return len({p.key for p in pictures}) == len({p.look for p in pictures}) == len(pictures) and any(
        p.split == "train" for p in pictures
    )


PICTURES = st.lists(MADE, min_size=1, max_size=7).filter(distinct)


def pictures_of(dataset: Dataset, split: Split) -> list[tuple[str, bytes, str, int]]:
    made, root, found = dataset.manifest, dataset.root, []
    owners = [n for n, part in enumerate(made.parts) for _ in range(getattr(part, split))]
    for entry, part in zip(made.entries(split), owners, strict=True):
        for row in read_index(root, entry):
            image = root.read(entry.tar, int(row["image_offset"]), int(row["image_size"]))
            name = made.classes[made.parts[part].labels[row["label"]]]
            facts = json.loads(root.read(entry.tar, int(row["json_offset"]), int(row["json_size"])))
            assert facts["label"] == name
            found.append((row["key"].decode(), image, name, part))
    return found


@settings(max_examples=25, deadline=None)
@given(datasets=st.lists(PICTURES, min_size=2, max_size=3), size=st.integers(1, 3))
@example(datasets=[[Made(1), Made(2, split="holdout")], [Made(2), Made(3)]], size=2)  # the same original
@example(datasets=[[Made(1), Made(2, split="holdout")], [Made(2, original=5), Made(3)]], size=2)  # it looks the same
def test_no_held_out_picture_is_trained_on_and_nothing_else_is_lost(tmp_path_factory, datasets, size) -> None:
    root = LocalFolder(tmp_path_factory.mktemp("root"))
    made = [published(root, pictures, shard_size=size) for pictures in datasets]
    by_digest = {dataset.digest: pictures for dataset, pictures in zip(made, datasets, strict=True)}
    if len(by_digest) < len(datasets):
        return
    held = [(p.key, p.look) for pictures in datasets for p in pictures if p.split == "holdout"]
    kept = {
        digest: {
            p.key
            for p in pictures
            if p.split == "train" and not any(p.key == key or p.look == look for key, look in held)
        }
        for digest, pictures in by_digest.items()
    }
    weights = [1.0, 2.5, 3.0][: len(made)]
    if not all(kept.values()):
        with pytest.raises(ValueError, match="held out by another of these datasets: leave it out"):
            mix(root, list(zip(made, weights, strict=True)))
        return
    mixed = mix(root, list(zip(made, weights, strict=True)))
    train, holdout = (pictures_of(mixed, split) for split in ("train", "holdout"))
    assert not {image for _, image, *_ in train} & {image for _, image, *_ in holdout}
    assert not {key for key, *_ in train} & {key for key, *_ in holdout}
    assert len({key for key, *_ in holdout}) == len({image for _, image, *_ in holdout}) == len(holdout)
    for number, part in enumerate(mixed.manifest.parts):
        assert {key for key, *_, owner in train if owner == number} == kept[part.dataset]
    there = {key for key, *_ in holdout}, {image for _, image, *_ in holdout}
    assert there[0] <= {key for key, _ in held}
    assert all(key in there[0] or encode_png(Made(look).image) in there[1] for key, look in held)
    assert lint(mixed) == []
    assert manifest.load(mixed.uri) == mixed.manifest
    assert mix(root, list(reversed(list(zip(made, weights, strict=True))))).digest == mixed.digest


@pytest.fixture
def root(tmp_path: Path) -> LocalFolder:
    return LocalFolder(tmp_path)


def test_shards_that_need_no_change_are_shared_and_take_no_room(root: LocalFolder) -> None:
    a = published(root, [Made(n, "cats", "holdout" if n < 2 else "train") for n in range(12)])
    b = published(root, [Made(100 + n, "dogs", "holdout" if n < 2 else "train") for n in range(12)])
    before = {found.name: found.mark for found in root.walk()}
    mixed = mix(root, [(a, 3), (b, 1)])
    after = {found.name: found.mark for found in root.walk()}
    assert before.items() <= after.items()
    place = manifest.place_of(mixed.digest)
    assert [name for name in after if name not in before] == [f"{place}/manifest.json", f"{place}/report.json"]
    made = mixed.manifest
    assert (made.classes, made.train_counts, made.holdout_counts, made.set_aside) == (
        ("cats", "dogs"),
        (10, 10),
        (2, 2),
        {},
    )
    assert {part.dataset: part.weight for part in made.parts} == {a.digest: 3, b.digest: 1}
    assert mixed.whole().images == 20


def test_only_the_shards_that_hold_such_pictures_are_written_again(root: LocalFolder) -> None:
    a = published(root, [Made(n, "cats", "holdout" if n == 3 else "train") for n in range(12)])
    b = published(root, [Made(n, "dogs") for n in (3, *range(20, 31))])
    mixed = mix(root, [(a, 1), (b, 1)])
    shared = {entry.sha256 for entry in mixed.manifest.shards} & {
        e.sha256 for e in (*a.manifest.shards, *b.manifest.shards)
    }
    assert len(shared) == len(mixed.manifest.shards) - 1 == len(a.manifest.shards) + len(b.manifest.shards) - 1
    assert mixed.manifest.set_aside == {HELD_ELSEWHERE: 1}
    assert mixed.manifest.train_counts == (11, 11)


def test_labels_are_those_of_the_union(root: LocalFolder) -> None:
    a = published(root, [Made(1, "cats"), Made(2, "dogs"), Made(3, "dogs", "holdout")])
    b = published(root, [Made(4, "ants"), Made(5, "dogs")])
    mixed = mix(root, [(a, 1), (b, 1)])
    assert mixed.manifest.classes == ("ants", "cats", "dogs")
    assert {key: label for key, _, label, _ in pictures_of(mixed, "train")} == {
        Made(1).key: "cats",
        Made(2).key: "dogs",
        Made(4).key: "ants",
        Made(5).key: "dogs",
    }


def test_what_cannot_be_mixed_is_refused_with_what_to_do(root: LocalFolder, tmp_path: Path) -> None:
    a, b = published(root, [Made(1)]), published(root, [Made(2)])
    large = published(root, [Made(3)], resolution=32)
    dark = published(root, [Made(4)], processing=Processing(background="#000000"))
    shaped = published(root, [Made(4)], processing=Processing(background="#ffffff", buckets=((8, 16), (16, 8))))
    far = published(LocalFolder(tmp_path / "far"), [Made(5)])
    mixed = mix(root, [(a, 1), (b, 1)])
    for datasets, says in (
        ([(a, 1)], "two datasets or more"),
        ([(a, 1), (b, 0)], "a weight is a number above 0"),
        ([(a, 1), (b, float("inf"))], "a weight is a number above 0"),
        ([(a, 1), (a, 2)], "given 2 times"),
        ([(a, 1), (large, 1)], "has resolution 32, .* has 16"),
        ([(a, 1), (dark, 1)], "has background #000000, .* has #ffffff: shard one"),
        ([(a, 1), (shaped, 1)], r"has buckets 16x8, 8x16, .* has none \(its pictures are square\): shard one"),
        ([(a, 1), (far, 1)], "mix datasets of one data root"),
        ([(a, 1), (mixed, 1)], "is a mixture itself: mix what it is made of"),
    ):
        with pytest.raises(ValueError, match=says):
            mix(root, datasets)


def test_a_mixture_whose_parts_contradict_its_shards_is_no_manifest(root: LocalFolder) -> None:
    mixed = mix(root, [(published(root, [Made(1)]), 1), (published(root, [Made(2)]), 1)]).manifest
    for change in ({"train": 2}, {"holdout": 1}, {"labels": (1,)}):
        parts = (mixed.parts[0].model_copy(update=change), *mixed.parts[1:])
        with pytest.raises(ValueError, match="part"):
            type(mixed).model_validate({**mixed.model_dump(), "parts": [part.model_dump() for part in parts]})
    plain = published(root, [Made(3)]).manifest
    assert plain.labels("train") == ((0,),)
    assert "parts" not in plain.model_dump()


def test_a_preview_of_a_mixture_has_the_classes_of_the_mixture(root: LocalFolder) -> None:
    a = published(root, [Made(1, "cats"), Made(2, "dogs")])
    b = published(root, [Made(3, "ants"), Made(4, "dogs")])
    rows = preview(mix(root, [(a, 1), (b, 1)]))
    shown = {label: {picture.key for picture in row} for label, row in rows.items()}
    assert shown == {"ants": {Made(3).key}, "cats": {Made(1).key}, "dogs": {Made(2).key, Made(4).key}}


def test_lint_finds_a_mixture_that_trains_on_what_a_part_holds_out(root: LocalFolder) -> None:
    """Such as nobody but a hand can make: parts may share training pictures, but no more."""
    a, b = published(root, [Made(1), Made(2, split="holdout"), Made(3)]), published(root, [Made(2), Made(3)])
    mixed = mix(root, [(a, 1), (b, 1)])
    assert [entry.pictures for entry in mixed.manifest.entries("train")].count(1) == 1
    assert lint(mixed) == []
    whole = [
        b.manifest.shards[0] if entry.pictures == 1 and entry.split == "train" else entry
        for entry in mixed.manifest.shards
    ]
    leaking = Dataset(mixed.uri, mixed.manifest.model_copy(update={"shards": tuple(whole), "train_counts": (4,)}))
    assert [(key, "train and holdout" in what) for _, key, what in lint(leaking)] == [(Made(2).key, True)]
