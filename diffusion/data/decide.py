"""What goes where: which files are kept, in which split, in which shard.  Nothing here reads a picture.

What is decided depends on the files' names and contents, the recipe and the parent version only, so neither the number of
workers nor the order of their answers nor an interruption can change a byte:

- One picture, one place: of files with equal pixels at the dataset's resolution one is kept, the others are recorded as
  duplicates: the one that the parent kept, else the first by name.  So a held-out picture is never also a training picture.
- Near duplicates, where the recipe asks: in the order of name a picture is dropped that is within so many bits of an earlier
  kept one; those that the parent kept come first, and stay.
- A picture keeps the split it has in the parent.  Of the others those are held out whose content hash, read as a number in
  [0, 1), is below `holdout`: adding pictures moves no other picture between the splits.  Two exceptions keep small sets
  usable: a class keeps at least one training picture, and at least one picture is held out where any can be.
- A full shard of the parent whose samples are all as they were stays.  All other samples are sorted by key, which begins the
  content hash: a random order, the same for everyone.  With aspect buckets a shard has pictures of one size.
"""

import json
import sqlite3
from collections.abc import Iterable, Iterator
from hashlib import sha256
from typing import NamedTuple

from diffusion.data import catalogue
from diffusion.data.manifest import DUPLICATE, Manifest, Split
from diffusion.data.pictures.bad_picture import NEAR_DUPLICATE
from diffusion.data.pictures.buckets import buckets_by, size_for
from diffusion.data.pictures.near import NearIndex
from diffusion.data.sources import BadSource
from diffusion.recipe import ShardRecipe, canonical_json

SPLITS: tuple[Split, ...] = ("train", "holdout")
# Rows lie on the disk by name.  What touches all of them does it in that order (`ORDER BY name`; `+` keeps SQLite from an
# index): in another, each row of a table that is larger than the cache would cost a page of its own.
_TABLES = """
DROP TABLE IF EXISTS aside;
DROP TABLE IF EXISTS kept;
DROP TABLE IF EXISTS sample;
DROP TABLE IF EXISTS near_bands;
CREATE TABLE aside (name TEXT PRIMARY KEY, kind TEXT, detail TEXT) WITHOUT ROWID;
CREATE TABLE kept (
    name TEXT PRIMARY KEY, pixels TEXT, content TEXT, label TEXT,
    old INTEGER,   -- the parent kept this picture under this name
    split TEXT, fixed INTEGER,   -- fixed: the split is the parent's
    draw REAL) WITHOUT ROWID;
CREATE TABLE sample (
    name TEXT PRIMARY KEY, split TEXT, key TEXT, label INTEGER, digest TEXT,
    bucket INTEGER,   -- place of the picture's size among the recipe's; 0 where all are square
    shared INTEGER,   -- the parent's shard that holds it and stays
    number INTEGER,   -- else: the new shard of its split that it goes to
    image TEXT) WITHOUT ROWID;   -- [offset, size, crc32] in its shard
"""


class NewShard(NamedTuple):
    """A shard to write: the `number`-th new one of its split.  `digest` is of its samples, so of its bytes."""

    split: Split
    number: int
    digest: str
    bucket: int


def choose(db: sqlite3.Connection, near: int | None, released: Iterable[str]) -> dict[str, int]:
    """Which files are kept and which are set aside: fills `aside` and `kept`.  Returns kind of reason -> files.

    near: bits within which pictures are near duplicates; None: there are none.  released: sha256 of files that are kept
    however near they are to others.
    """
    db.create_function("draw", 1, draw, deterministic=True)
    db.executescript(_TABLES)
    with catalogue.transaction(db):
        _keep(db, near, set(released))
    return dict(db.execute("SELECT kind, count(*) FROM aside GROUP BY kind ORDER BY kind"))


def arrange(db: sqlite3.Connection, recipe: ShardRecipe, parent: Manifest | None) -> tuple[str, ...]:
    """Where the kept ones go: fills `sample`.  Returns the classes in the order of their indices.

    Raises BadSource where nothing is kept, or nothing can be held out.
    """
    with catalogue.transaction(db):
        _divide(db, recipe.holdout, parent is not None)
        classes = _classes(db, parent)
        _fill_shards(db, classes, recipe)
    return classes


def draw(content: str) -> float:
    """A content hash as a number in [0, 1), from other digits than those that sort the samples."""
    return int(content[48:], 16) / 16**16


def _keep(db: sqlite3.Connection, near: int | None, released: set[str]) -> None:
    db.execute(
        "INSERT INTO aside SELECT f.name, f.kind, f.detail FROM items JOIN found f USING (name) WHERE f.kind IS NOT NULL"
    )
    db.execute(
        "CREATE TEMP TABLE equals AS SELECT f.name, f.pixels, f.content, i.label, b.name IS NOT NULL AS old,"
        " first_value(f.name) OVER (PARTITION BY f.pixels ORDER BY b.name IS NULL, f.name) AS first"
        " FROM items i JOIN found f USING (name) LEFT JOIN before b"
        " ON b.name = f.name AND b.pixels = f.pixels AND b.split IS NOT NULL WHERE f.kind IS NULL"
    )
    db.execute(
        "INSERT INTO kept SELECT name, pixels, content, label, old, NULL, 0, draw(content) FROM equals WHERE name = first"
        " ORDER BY name"
    )
    if near is not None:
        _drop_near(db, near, released)
    db.execute(
        "INSERT INTO aside SELECT e.name, ?, 'the same picture as ' || e.first || CASE WHEN e.label <> k.label"
        " THEN ', which is kept as ' || k.label || '; this one says ' || e.label ELSE '' END"
        " FROM equals e LEFT JOIN kept k ON k.name = e.first WHERE e.name <> e.first",
        (DUPLICATE,),
    )
    db.execute("DROP TABLE equals")


def _drop_near(db: sqlite3.Connection, near: int, released: set[str]) -> None:
    index = NearIndex(db)
    hashes = db.execute(
        "SELECT k.name, f.hash, f.file, k.old FROM kept k JOIN found f USING (name) WHERE f.hash IS NOT NULL"
        " ORDER BY k.old DESC, k.name"
    )
    for name, text, file, old in hashes:
        look = int(text, 16)
        if old or file in released:
            index.add(name, look)
        elif other := index.keep(name, look, near):
            row = (name, NEAR_DUPLICATE, f"nearly the same picture as {other}")
            db.execute("INSERT INTO aside VALUES (?, ?, ?)", row)
    db.execute("DELETE FROM kept WHERE name IN (SELECT name FROM aside)")


def _divide(db: sqlite3.Connection, holdout: float, goes_on: bool) -> None:
    db.execute(
        "UPDATE kept SET fixed = 1, split = b.split FROM before b WHERE b.pixels = kept.pixels AND b.split IS NOT NULL"
    )
    db.execute("UPDATE kept SET split = iif(draw < ?, 'holdout', 'train') WHERE NOT fixed", (holdout,))
    # of a class that has no training picture of the parent's, the picture that is drawn last trains
    db.execute("DROP TABLE IF EXISTS temp.trains")
    db.execute(
        "CREATE TEMP TABLE trains AS SELECT name FROM"
        " (SELECT name, row_number() OVER (PARTITION BY label ORDER BY draw DESC, content) AS place FROM kept"
        "  WHERE NOT fixed AND label NOT IN (SELECT label FROM kept WHERE fixed AND split = 'train')) WHERE place = 1"
    )
    db.execute("UPDATE kept SET split = 'train' WHERE name IN (SELECT name FROM trains)")
    if holdout == 0 or db.execute("SELECT 1 FROM kept WHERE split = 'holdout' LIMIT 1").fetchone():
        return
    first = db.execute(
        "SELECT name FROM kept WHERE NOT fixed AND name NOT IN (SELECT name FROM trains) ORDER BY draw, content LIMIT 1"
    ).fetchone()
    if first is None:
        pictures, classes = db.execute("SELECT count(*), count(DISTINCT label) FROM kept").fetchone()
        why = "what was trained on stays in training" if goes_on else "since each class needs one for training"
        raise BadSource(
            f"pictures: {pictures:,}, classes: {classes:,}: none can be held out, {why}. Add pictures: a model is judged by"
            " some that training never saw. Or hold out none: `--set shard.holdout=0`"
        )
    db.execute("UPDATE kept SET split = 'holdout' WHERE name = ?", first)


def _classes(db: sqlite3.Connection, parent: Manifest | None) -> tuple[str, ...]:
    known = parent.classes if parent else ()
    labels = {label for (label,) in db.execute("SELECT DISTINCT label FROM kept")}
    return (*known, *class_names(labels.difference(known)))


def class_names(labels: Iterable[str]) -> tuple[str, ...]:
    """Distinct labels in the order of their indices: alphabetical, or by value where all are whole numbers."""
    names = set(labels)
    if all(name.isascii() and name.isdecimal() for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))


def _fill_shards(db: sqlite3.Connection, classes: tuple[str, ...], recipe: ShardRecipe) -> None:
    label_of = {name: label for label, name in enumerate(classes)}
    bucket_of = {size: bucket for bucket, size in enumerate(buckets_by(recipe))}
    shard_size = recipe.shard_size
    kept = db.execute(
        "SELECT k.split, k.name, i.label, i.captions, i.extra, f.content, f.file, f.width, f.height"
        " FROM kept k JOIN items i USING (name) JOIN found f USING (name)"
    )
    db.executemany(
        "INSERT INTO sample VALUES (?, ?, ?, ?, ?, ?, NULL, NULL, NULL)",
        (
            (
                row[1],
                row[0],
                row[5][:32],
                label_of[row[2]],
                _digest(label_of[row[2]], _facts(*row[1:])),
                bucket_of[size_for(*row[7:], recipe)] if bucket_of else 0,
            )
            for row in kept
        ),
    )
    db.execute(  # no shard has more than shard_size
        "CREATE TEMP TABLE stays AS SELECT b.shard FROM before b JOIN sample s ON s.digest = b.sample"
        " GROUP BY b.shard HAVING count(*) = ?",
        (shard_size,),
    )
    db.execute(
        "UPDATE sample SET shared = b.shard, image = b.image FROM before b"
        " WHERE b.sample = sample.digest AND b.shard IN (SELECT shard FROM stays)"
    )
    db.execute("DROP TABLE stays")
    db.execute(
        "UPDATE sample SET number = s.number FROM"
        " (SELECT name, dense_rank() OVER (PARTITION BY split ORDER BY bucket, place / ?) - 1 AS number FROM"
        "  (SELECT name, split, bucket, row_number() OVER (PARTITION BY split, bucket ORDER BY key) - 1 AS place"
        "   FROM sample WHERE shared IS NULL)"
        "  ORDER BY name) s WHERE s.name = sample.name",
        (shard_size,),
    )
    db.execute("CREATE INDEX by_shard ON sample (split, number, key) WHERE shared IS NULL")


def _facts(name: str, label: str, captions: str, extra: str, content: str, file: str, width: int, height: int) -> dict:
    """What the `.json` of a sample says."""
    return {
        "source": name,
        "label": label,
        "captions": json.loads(captions),
        "content_sha256": content,
        "file_sha256": file,
        "width": width,
        "height": height,
        "metadata": json.loads(extra),
    }


def _digest(label: int, facts: dict) -> str:
    """Identity of a sample: of all its members, since the content hash stands for the picture."""
    return sha256(canonical_json([label, facts])).hexdigest()


def without_pixels(db: sqlite3.Connection) -> list[str]:
    """Names of files that go into a new shard and whose picture is nowhere: it was set aside in the parent."""
    return [
        name
        for (name,) in db.execute(
            "SELECT s.name FROM sample s JOIN found f USING (name) WHERE +s.shared IS NULL AND f.image IS NULL"
            " AND NOT EXISTS (SELECT 1 FROM before b WHERE b.pixels = f.pixels AND b.split IS NOT NULL)"
        )
    ]


def shared_shards(db: sqlite3.Connection) -> list[int]:
    """Numbers, in the parent's manifest, of the shards that stay."""
    return [n for (n,) in db.execute("SELECT DISTINCT shared FROM sample WHERE shared IS NOT NULL ORDER BY shared")]


def new_shards(db: sqlite3.Connection) -> Iterator[NewShard]:
    """The shards to write, in reading order."""
    for split in SPLITS:
        count = db.execute(
            "SELECT coalesce(max(number) + 1, 0) FROM sample WHERE split = ? AND shared IS NULL", (split,)
        ).fetchone()[0]
        for number in range(count):
            rows = db.execute(
                "SELECT digest, bucket FROM sample WHERE split = ? AND number = ? AND shared IS NULL ORDER BY key",
                (split, number),
            ).fetchall()
            yield NewShard(split, number, sha256("".join(row[0] for row in rows).encode()).hexdigest(), rows[0][1])


def samples_of(db: sqlite3.Connection, shard: NewShard) -> list[dict]:
    """What goes into a shard, sorted by key: key, label, facts, and where the encoded picture is."""
    rows = db.execute(
        "SELECT s.key, s.label, coalesce(f.image, b.image), s.name, i.label, i.captions, i.extra, f.content, f.file,"
        " f.width, f.height FROM sample s JOIN items i USING (name) JOIN found f USING (name)"
        " LEFT JOIN before b ON b.pixels = f.pixels AND b.split IS NOT NULL"
        " WHERE s.split = ? AND s.number = ? AND s.shared IS NULL ORDER BY s.key",
        (shard.split, shard.number),
    )
    return [
        {"key": key, "label": label, "image": json.loads(image), "facts": _facts(*rest)}
        for key, label, image, *rest in rows
    ]


def place_images(db: sqlite3.Connection, shard: NewShard, images: list[list[int]]) -> None:
    """Note where in a written shard its pictures are.  images: [offset, size, crc32] by key."""
    names = db.execute(
        "SELECT name FROM sample WHERE split = ? AND number = ? AND shared IS NULL ORDER BY key",
        (shard.split, shard.number),
    ).fetchall()
    with catalogue.transaction(db):
        db.executemany(
            "UPDATE sample SET image = ? WHERE name = ?",
            ((json.dumps(image), name) for image, (name,) in zip(images, names, strict=True)),
        )


def counts(db: sqlite3.Connection, split: Split, classes: int) -> tuple[int, ...]:
    """Pictures of each class in a split."""
    found = dict(db.execute("SELECT label, count(*) FROM sample WHERE split = ? GROUP BY label", (split,)))
    return tuple(found.get(label, 0) for label in range(classes))
