"""What goes where: the splits' promises, on catalogues made by hand and against the plain rules written down slowly."""

import json
import sqlite3
from collections import defaultdict
from hashlib import sha256

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion.data import catalogue, decide
from diffusion.data.sources import BadSource
from diffusion.recipe import ShardRecipe


def filled(samples: list[tuple[str, str]]) -> sqlite3.Connection:
    """A catalogue in which pictures with these (content, label) were found, listed in this order."""
    db = sqlite3.connect(":memory:", isolation_level=None)
    db.executescript(catalogue._SCHEMA)
    catalogue.list_items(db, ((f"{content}.png", "m", "", label, "[]", "{}") for content, label in samples))
    facts = {"mark": "m", "file": "f", "bytes": 1, "width": 1, "height": 1}
    catalogue.record(db, ({"name": f"{c}.png", "content": c, "pixels": c, **facts} for c, _ in samples))
    return db


def contents(numbers: list[tuple[int, str]]) -> list[tuple[str, str]]:
    """Distinct pictures with labels."""
    return list({sha256(str(number).encode()).hexdigest(): label for number, label in numbers}.items())


def divided(samples: list[tuple[str, str]], holdout: float) -> tuple[list[str], list[str]]:
    """Contents of the training and the held-out pictures, sorted by key."""
    db = filled(samples)
    assert decide.choose(db, None, ()) == {}
    decide.arrange(db, ShardRecipe(holdout=holdout), None)
    splits = defaultdict(list)
    for name, split in db.execute("SELECT name, split FROM sample ORDER BY key"):
        splits[split].append(name.removesuffix(".png"))
    return splits["train"], splits["holdout"]


def plainly(samples: list[tuple[str, str]], holdout: float) -> set[str]:
    """The held-out contents by the rules as they are written."""
    draws = {content: int(content[48:], 16) / 16**16 for content, _ in samples}
    by_class = defaultdict(list)
    for content, label in samples:
        by_class[label].append(content)
    train = {max(sorted(members), key=draws.get) for members in by_class.values()}
    held = {content for content, _ in samples if draws[content] < holdout and content not in train}
    if holdout > 0 and not held:
        held = {min(sorted(draws.keys() - train), key=draws.get)}
    return held


@given(st.lists(st.tuples(st.integers(0, 500), st.sampled_from("abc")), min_size=1, max_size=60), st.floats(0, 0.9))
@settings(deadline=None)
def test_splits_keep_their_promises(draws, share):
    samples = contents(draws)
    labels = dict(samples)
    if share > 0 and len(samples) == len(set(labels.values())):
        with pytest.raises(BadSource, match="Add pictures"):
            divided(samples, share)
        return
    train, held = divided(samples, share)
    assert set(held) == plainly(samples, share)
    assert {labels[content] for content in train} == set(labels.values())
    assert bool(held) == (share > 0)
    assert sorted(train + held) == sorted(labels)
    assert (train, held) == (sorted(train), sorted(held))
    assert divided(samples[::-1], share) == (train, held)
    grown = samples + [(c, label) for c, label in contents([(n, "a") for n in range(501, 540)])]
    moved = set(held) ^ {content for content in divided(grown, share)[1] if content in labels}
    assert len(moved) <= len(set(labels.values())) + 1  # only the exceptions for small sets can move


def test_the_share_held_out_is_the_recipes():
    train, held = divided(contents([(n, "ab"[n % 2]) for n in range(20_000)]), 0.05)
    assert len(train) + len(held) == 20_000
    # binomial: standard deviation sqrt(20000 x 0.05 x 0.95) = 30.8
    assert abs(len(held) - 1000) < 5 * 30.8


def with_hashes(hashes: dict[str, int | None], kept_before: set[str]) -> sqlite3.Connection:
    db = filled([(name, "a") for name in hashes])
    for name, look in hashes.items():
        text = None if look is None else f"{look:016x}"
        db.execute("UPDATE found SET hash = ?, file = ? WHERE name = ?", (text, name, f"{name}.png"))
    rows = ({"name": f"{name}.png", "pixels": name, "split": "train"} for name in kept_before)
    catalogue.load_before(db, "parent", rows)
    return db


@given(
    st.dictionaries(st.integers(0, 99), st.none() | st.integers(0, 2**64 - 1), min_size=1, max_size=12),
    st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99), st.sets(st.integers(0, 63), max_size=6)), max_size=20),
    st.integers(0, 5),
    st.sets(st.integers(0, 99)),
    st.sets(st.integers(0, 99)),
)
@settings(deadline=None)
def test_near_duplicates_are_what_the_plain_rule_drops(seeds, copies, near, kept_before, released):
    """In the order of name, those that the parent kept first: dropped is what is near to one that is kept."""
    numbers = dict(seeds)
    for number, of, flipped in copies:
        if number not in numbers and numbers.get(of) is not None:
            numbers[number] = numbers[of] ^ sum(1 << bit for bit in flipped)
    hashes = {sha256(str(n).encode()).hexdigest(): look for n, look in numbers.items()}
    name_of = {n: sha256(str(n).encode()).hexdigest() for n in numbers}
    old = {name_of[n] for n in kept_before & numbers.keys()}
    passing = {name_of[n] for n in released & numbers.keys()}
    kept, dropped = {}, set()
    for name in sorted(hashes, key=lambda name: (name not in old, name)):
        look = hashes[name]
        close = look is not None and any((look ^ other).bit_count() <= near for other in kept.values())
        if close and name not in old | passing:
            dropped.add(name)
        elif look is not None:
            kept[name] = look
    db = with_hashes(hashes, old)
    counts = decide.choose(db, near, passing)
    assert counts == ({"near duplicate": len(dropped)} if dropped else {})
    assert {name.removesuffix(".png") for (name,) in db.execute("SELECT name FROM aside")} == dropped
    assert db.execute("SELECT count(*) FROM kept").fetchone()[0] == len(hashes) - len(dropped)


def test_of_near_duplicates_the_one_that_the_parent_kept_stays():
    names = [f"{i:x}" * 64 for i in range(4)]
    looks = dict(zip(names, (0b0111, 0b0011, 0b0001, 0xFF << 40), strict=True))
    for old, dropped in (({names[2]}, names[:2]), ({names[1]}, [names[0], names[2]]), (set(), names[1:3])):
        db = with_hashes(looks, old)
        assert decide.choose(db, 2, ()) == {"near duplicate": 2}
        assert [name.removesuffix(".png") for (name,) in db.execute("SELECT name FROM aside")] == dropped


def test_classes_are_ordered_by_name_or_number():
    assert decide.class_names(["b", "a", "b", "C"]) == ("C", "a", "b")
    assert decide.class_names(["10", "9", "0"]) == ("0", "9", "10")


def test_shards_are_full_but_for_the_last_of_a_split():
    db = filled(contents([(n, "a") for n in range(1000)]))
    decide.choose(db, None, ())
    decide.arrange(db, ShardRecipe(holdout=0.1, shard_size=64), None)
    sizes = defaultdict(list)
    for shard in decide.new_shards(db):
        sizes[shard.split].append(
            db.execute("SELECT count(*) FROM sample WHERE split = ? AND number = ?", shard[:2]).fetchone()[0]
        )
    assert sum(map(sum, sizes.values())) == 1000
    for split in sizes.values():
        assert set(split[:-1]) == {64}
        assert 0 < split[-1] <= 64


def test_facts_of_a_sample_change_its_digest():
    args = ("a/1.png", "a", json.dumps([["x", 1.0]]), "{}", "0" * 64, "1" * 64, 5, 6)
    changed = [
        (*args[:i], other, *args[i + 1 :])
        for i, other in enumerate(("a/2.png", "b", "[]", '{"k":1}', "2" * 64, "3" * 64, 7, 8))
    ]
    digests = {decide._digest(label, decide._facts(*what)) for label in (0, 1) for what in (args, *changed)}
    assert len(digests) == 18
