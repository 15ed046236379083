"""What the shard stage knows of its files: one SQLite file in its work folder, so memory stays flat and a stage that was
interrupted goes on.

    items    what the source lists now
    found    what was found in each file: facts of its pixels, or why it cannot be used
    before   what became of each file in the parent version
    packed   the shards that are written
    aside, kept, sample   what was decided (`diffusion.data.decide`), made anew from the others each time

A file is known by its name and mark: what was found in it holds as long as both stay.
"""

import errno
import fcntl
import json
import os
import shutil
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from diffusion.data.manifest import NOT_DAMAGE
from diffusion.data.pictures.bad_picture import UNREADABLE
from diffusion.data.quarantine import SetAside
from diffusion.recipe import canonical_json
from diffusion.store.publish import disk_full

FACTS = "file TEXT, bytes INTEGER, content TEXT, pixels TEXT, width INTEGER, height INTEGER, hash TEXT, image TEXT"
_FOUND = ("name", "mark", "kind", "detail", *(column.split()[0] for column in FACTS.split(", ")))
_SCHEMA = f"""
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS items (
    name TEXT PRIMARY KEY, mark TEXT, place TEXT, label TEXT, captions TEXT, extra TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS found (name TEXT PRIMARY KEY, mark TEXT, kind TEXT, detail TEXT, {FACTS}) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS before (
    name TEXT PRIMARY KEY, mark TEXT, kind TEXT, detail TEXT, {FACTS},
    label TEXT, captions TEXT, extra TEXT, split TEXT, sample TEXT, shard INTEGER) WITHOUT ROWID;
CREATE UNIQUE INDEX IF NOT EXISTS kept_before ON before (pixels) WHERE split IS NOT NULL;
CREATE INDEX IF NOT EXISTS sample_before ON before (sample) WHERE sample IS NOT NULL;
CREATE TABLE IF NOT EXISTS packed (shard TEXT PRIMARY KEY, result TEXT) WITHOUT ROWID;
"""


LOCK = "lock"  # file in a work folder; when it was written, work was begun or gone on with


class Busy(OSError):
    """Another process works in this work folder."""


@contextmanager
def opened(folder: Path) -> Iterator[sqlite3.Connection]:
    """The catalogue in `folder`, for this process alone.  A folder that is not `finish`ed is found again as it was left.

    Raises Busy and DiskFull.
    """
    with locked(folder):
        try:
            db = sqlite3.connect(folder / "catalogue.db", isolation_level=None)
            try:
                # WAL: after a kill everything committed is there.  Exclusive: no memory shared between processes.
                for pragma in (
                    "locking_mode=EXCLUSIVE",
                    "journal_mode=WAL",
                    "synchronous=NORMAL",
                    "cache_size=-16384",
                ):
                    db.execute(f"PRAGMA {pragma}")
                db.executescript(_SCHEMA)
                db.execute("INSERT OR IGNORE INTO meta VALUES ('identity', lower(hex(randomblob(8))))")
                yield db
            finally:
                db.close()
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_FULL:
                raise
            raise disk_full(folder, "the catalogue") from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """A work folder, made if need be, for this process alone.  Raises Busy."""
    lock = _lock(folder)
    try:
        yield
    finally:
        os.close(lock)


def identity(db: sqlite3.Connection) -> str:
    """16 hex digits that no other catalogue has."""
    return db.execute("SELECT value FROM meta WHERE key = 'identity'").fetchone()[0]


def finish(folder: Path) -> None:
    """Delete the work folder: what it was for is published."""
    shutil.rmtree(folder)


def _lock(folder: Path) -> int:
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(descriptor).st_ino == os.stat(folder / LOCK).st_ino:
                os.truncate(descriptor, 0)
                os.write(descriptor, str(os.getpid()).encode())
                return descriptor
        except FileNotFoundError:  # its last owner finished between our two steps
            pass
        except BlockingIOError:
            owner = os.read(descriptor, 20).decode()
            os.close(descriptor)
            raise Busy(
                errno.EBUSY,
                f"process {owner} shards this source with this recipe already (its work is in {folder}): wait",
            ) from None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


@contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[None]:
    """All of the block, or nothing of it."""
    db.execute("BEGIN")
    try:
        yield
    except BaseException:
        if db.in_transaction:  # a full disk has ended it already
            db.execute("ROLLBACK")
        raise
    db.execute("COMMIT")


def list_items(db: sqlite3.Connection, rows: Iterable[tuple]) -> None:
    """Replace the listing.  rows: name, mark, place, label, captions (JSON), extra (JSON).  ValueError: a name twice."""
    with transaction(db):
        db.execute("DELETE FROM items")
        db.executemany("INSERT INTO items VALUES (?, ?, ?, ?, ?, ?)", rows)


def list_before(db: sqlite3.Connection, places: Iterable[tuple[str, str]]) -> None:
    """Replace the listing by the parent's.  places: (name, place) of the files that can be read; "" of all others."""
    with transaction(db):
        db.execute("DELETE FROM items")
        db.execute("INSERT INTO items SELECT name, mark, '', label, captions, extra FROM before")
        db.executemany("UPDATE items SET place = ?2 WHERE name = ?1", places)


def load_before(db: sqlite3.Connection, digest: str, rows: Iterable[dict]) -> None:
    """Take in the parent's files, unless those of the dataset `digest` are in already.  "" and no rows: no parent."""
    if db.execute("SELECT value FROM meta WHERE key = 'parent'").fetchone() == (digest,):
        return
    columns = [row[1] for row in db.execute("PRAGMA table_info(before)")]
    with transaction(db):
        db.execute("DELETE FROM before")
        # what was adopted from another parent: it may be gone for being damaged
        db.execute("DELETE FROM found WHERE json_extract(image, '$[1]') LIKE 'shards/%'")
        statement = f"INSERT INTO before VALUES ({', '.join('?' * len(columns))})"
        db.executemany(statement, (tuple(row.get(column) for column in columns) for row in rows))
        db.execute("INSERT OR REPLACE INTO meta VALUES ('parent', ?)", (digest,))


def adopt(db: sqlite3.Connection, released: Iterable[str], policy: Iterable[str]) -> None:
    """What the parent found in files that are as they were is not looked for again.  A file of `released` (sha256) that was
    set aside for a reason in `policy` is; and so is what an interrupted stage found in files that were released then or now,
    and not both.
    """
    now = set(released)
    passes = (json.dumps(list(policy)), json.dumps(list(now)))
    passing = "kind IN (SELECT value FROM json_each(?)) AND file IN (SELECT value FROM json_each(?))"
    decided = f"kind IN ({', '.join(repr(kind) for kind in NOT_DAMAGE)})"  # from what was found, and decided again
    facts = ", ".join(name for name in _FOUND if name not in ("kind", "detail"))
    with transaction(db):
        (last,) = db.execute("SELECT value FROM meta WHERE key = 'released'").fetchone() or ("[]",)
        db.executemany("DELETE FROM found WHERE file = ?", ((file,) for file in set(json.loads(last)) ^ now))
        db.execute("INSERT OR REPLACE INTO meta VALUES ('released', ?)", (json.dumps(list(now)),))
        db.execute(
            f"INSERT OR REPLACE INTO found (kind, detail, {facts})"
            f" SELECT iif({decided}, NULL, kind), iif({decided}, NULL, detail), {facts} FROM before b"
            " WHERE EXISTS (SELECT 1 FROM items i WHERE i.name = b.name AND i.mark = b.mark)"
            " AND NOT EXISTS (SELECT 1 FROM found f WHERE f.name = b.name AND f.mark = b.mark)"
            f" AND NOT coalesce({passing}, 0)",
            passes,
        )


def forget(db: sqlite3.Connection, names: Iterable[str]) -> None:
    """What was found in these files is looked for again."""
    with transaction(db):
        db.executemany("DELETE FROM found WHERE name = ?", ((name,) for name in names))


def forget_unread(db: sqlite3.Connection) -> None:
    """Files whose bytes could not be had are tried again: what hindered it - a right, a disk, an archive that was written
    just then - may be gone, and need not show in their mark."""
    db.execute("DELETE FROM found WHERE kind = ? AND file IS NULL", (UNREADABLE,))


def unknown(db: sqlite3.Connection, size: int) -> Iterator[list[tuple[str, str, str]]]:
    """Chunks of (name, mark, place) of the files that nothing is known of, by name.  What is recorded meanwhile, of chunks
    handed out before, disturbs nothing."""
    after = ""
    while rows := db.execute(
        "SELECT i.name, i.mark, i.place FROM items i LEFT JOIN found f ON f.name = i.name AND f.mark = i.mark"
        " WHERE i.name > ? AND f.name IS NULL ORDER BY i.name LIMIT ?",
        (after, size),
    ).fetchall():
        after = rows[-1][0]
        yield rows


def record(db: sqlite3.Connection, rows: Iterable[dict]) -> None:
    """Remember what was found in files."""
    statement = f"INSERT OR REPLACE INTO found ({', '.join(_FOUND)}) VALUES ({', '.join('?' * len(_FOUND))})"
    texts = (row | {"image": json.dumps(row["image"])} if row.get("image") else row for row in rows)
    with transaction(db):
        db.executemany(statement, (tuple(row.get(name) for name in _FOUND) for row in texts))


def progress(db: sqlite3.Connection) -> tuple[int, int]:
    """(files of which something is known, files in all)."""
    known = "SELECT count(*) FROM items i JOIN found f ON f.name = i.name AND f.mark = i.mark"
    return db.execute(known).fetchone()[0], db.execute("SELECT count(*) FROM items").fetchone()[0]


def packed(db: sqlite3.Connection, shard: str) -> dict | None:
    """What writing the shard gave, where it was written."""
    row = db.execute("SELECT result FROM packed WHERE shard = ?", (shard,)).fetchone()
    return row and json.loads(row[0])


def record_packed(db: sqlite3.Connection, shard: str, result: dict) -> None:
    """Remember what writing a shard gave."""
    db.execute("INSERT OR REPLACE INTO packed VALUES (?, ?)", (shard, canonical_json(result).decode()))


def set_aside(db: sqlite3.Connection) -> Iterator[tuple[SetAside, str]]:
    """Each file set aside, and its place in the source, by name."""
    rows = db.execute(
        "SELECT a.name, a.kind, a.detail, f.file, f.bytes, i.place FROM aside a JOIN found f USING (name)"
        " JOIN items i USING (name) ORDER BY a.name"
    )
    for name, kind, detail, file, size, place in rows:
        yield SetAside(name=name, kind=kind, detail=detail, sha256=file, bytes=size), place
