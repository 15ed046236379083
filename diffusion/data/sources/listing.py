"""The list of a source: an SQLite table on the disk, since millions of files are more than memory should hold.

First the files of the containers go in, then rows of metadata, then the items that a layout makes of both.  The tables
are a temporary database without a name, which ends with its connection.
"""

import hashlib
import json
import sqlite3
import unicodedata
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import groupby, islice
from typing import BinaryIO, TypeVar

from diffusion.data.pictures.bad_picture import BadPicture
from diffusion.data.sources.items import (
    MAX_LABELS,
    SINGLE_CLASS,
    BadSource,
    Caption,
    File,
    Item,
    check_label,
    identity,
    is_label,
    suffix,
)
from diffusion.data.sources.places import is_refused, is_span, open_at, open_place, read_item, span_of
from diffusion.store.storage import S3_SCHEME, StorageUnavailable

T = TypeVar("T")

_CHUNK = 1024
_THREADS = 16  # of requests for small files to a bucket
_AHEAD = 256  # items
_TABLES = """
    PRAGMA journal_mode = MEMORY; PRAGMA synchronous = OFF; PRAGMA cache_size = -16000;
    CREATE TABLE files (name TEXT PRIMARY KEY, inside TEXT, size INT, mark TEXT, place TEXT, key TEXT) WITHOUT ROWID;
    CREATE TABLE rows (name TEXT PRIMARY KEY, said TEXT, data TEXT) WITHOUT ROWID;
    CREATE TABLE items (name TEXT PRIMARY KEY, place TEXT, mark TEXT, label TEXT, captions TEXT, extra TEXT, size INT)
        WITHOUT ROWID;
"""


class Listing:
    """The files, rows and items of one source."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._db = sqlite3.connect("", check_same_thread=False, isolation_level=None)
        self._db.executescript(_TABLES)
        self.suffixes: Counter[str] = Counter()  # of the files
        self.left_out: Counter[str] = Counter()  # what is no item, by reason
        self.bytes: int | None = 0  # of the items; None where they are not known without reading
        self.labels: Counter[str] = Counter()
        self._sum = 0
        self._opened: tuple[str, BinaryIO] | None = None

    def add_files(self, files: Iterable[File], source: str) -> None:
        """Raises BadSource where a name is there already.  source: for the message."""
        for chunk in _chunks(files):
            self.suffixes.update(suffix(file.name) for file in chunk)
            double = self._insert("files", [(*file, _key(file.name)) for file in chunk])
            if double:
                raise BadSource(f"{source} holds {double[0]!r} twice: pack it again")

    def forget_files(self) -> None:
        """The files are containers; what they contain comes in their place."""
        self._db.execute("DELETE FROM files")
        self.suffixes.clear()

    def add_rows(self, rows: Iterable[tuple[str, str, dict]]) -> None:
        """(file name, where it is said, what).  Raises BadSource where a file has a row already."""
        for chunk in _chunks(rows):
            double = self._insert("rows", [(name, where, json.dumps(row)) for name, where, row in chunk])
            if double:
                raise BadSource(f"{double[1]}: {double[0]} has a line already: keep one, with all its captions")

    def add_items(self, items: Iterable[Item]) -> None:
        """Raises BadSource where the labels are no classes: some are missing, or there are too many."""
        unlabelled, first = 0, ""
        for chunk in _chunks(items):
            rows = []
            for item in chunk:
                if is_refused(item.place):
                    item = replace(item, label=item.label if is_label(item.label) else SINGLE_CLASS)
                else:
                    if not item.label:
                        first = min(first or item.name, item.name)
                        unlabelled += 1
                        item = replace(item, label=SINGLE_CLASS)
                    check_label(item.label, item.name)
                    self.labels[item.label] += 1
                self.bytes = None if self.bytes is None or item.size is None else self.bytes + item.size
                self._sum = (self._sum + int.from_bytes(hashlib.sha256(identity(item)).digest())) % 2**256
                captions, extra = json.dumps(item.captions), json.dumps(item.extra)
                rows.append((item.name, item.place, item.mark, item.label, captions, extra, item.size))
            if len(self.labels) > MAX_LABELS:
                raise BadSource(
                    f"source {self.uri} has more than {MAX_LABELS:,} different labels: are these captions or names in the"
                    " column of labels?"
                )
            double = self._insert("items", rows)
            if double:
                raise BadSource(f"source {self.uri} names {double[0]} twice: keep one")
        plain: dict[str, str] = {}
        for label in self.labels:
            if (other := plain.setdefault(unicodedata.normalize("NFC", label), label)) != label:
                raise BadSource(
                    f"source {self.uri} has the classes {other!a} and {label!a}, which look the same ({label}) and are"
                    " written differently in Unicode: give both one name"
                )
        if 0 < unlabelled < self.labels.total():
            raise BadSource(
                f"source {self.uri}: {unlabelled} of {self.labels.total()} pictures have no class (first: {first}): move"
                " them into class folders or give them a label in metadata.jsonl, or the table"
            )

    def _insert(self, table: str, rows: list[tuple]) -> tuple | None:
        """Insert rows, or none of them; returns the first whose name is there already, if one is."""
        marks = ",".join("?" * len(rows[0]))
        self._db.execute("BEGIN")
        try:
            self._db.executemany(f"INSERT INTO {table} VALUES ({marks})", rows)
        except sqlite3.IntegrityError:
            self._db.execute("ROLLBACK")
            seen = {name for (name,) in self._named(table, [row[0] for row in rows])}
            for row in rows:
                if row[0] in seen:
                    return row
                seen.add(row[0])
        self._db.execute("COMMIT")
        return None

    def _named(self, table: str, names: list[str]) -> sqlite3.Cursor:
        return self._db.execute(f"SELECT name FROM {table} WHERE name IN ({','.join('?' * len(names))})", names)

    @property
    def fingerprint(self) -> str:
        """sha256 (64 hex digits) of each item's name, mark and metadata, added up modulo 2^256: any order gives the same."""
        return f"{self._sum:064x}"

    def items(self) -> Iterator[Item]:
        """The items, sorted by name."""
        for *facts, captions, extra, size in self._db.execute("SELECT * FROM items ORDER BY name"):
            yield Item(*facts, tuple(Caption(*caption) for caption in json.loads(captions)), json.loads(extra), size)

    def count(self, table: str) -> int:
        return self._db.execute(f"SELECT count(*) FROM {table}").fetchone()[0]

    def files(self) -> Iterator[File]:
        """The files, sorted by name."""
        yield from map(File._make, self._db.execute("SELECT name, inside, size, mark, place FROM files ORDER BY name"))

    def file(self, name: str) -> File | None:
        found = self._db.execute("SELECT name, inside, size, mark, place FROM files WHERE name = ?", (name,)).fetchone()
        return found and File._make(found)

    def samples(self) -> Iterator[list[File]]:
        """The files by key, WebDataset's: the path up to the first dot of the last name."""
        keyed = self._db.execute("SELECT key, name, inside, size, mark, place FROM files ORDER BY key, name")
        for _, group in groupby(keyed, key=lambda row: row[0]):
            yield [File._make(row[1:]) for row in group]

    def row(self, name: str) -> tuple[str, dict] | None:
        """(where it is said, what) of a file."""
        found = self._db.execute("SELECT said, data FROM rows WHERE name = ?", (name,)).fetchone()
        return found and (found[0], json.loads(found[1]))

    def row_names(self) -> Iterator[str]:
        yield from (name for (name,) in self._db.execute("SELECT name FROM rows ORDER BY name"))

    def rows_without_files(self) -> tuple[int, list[str]]:
        """How many rows name no file, and the first few of these names."""
        missing = "FROM rows WHERE NOT EXISTS (SELECT 1 FROM files WHERE files.name = rows.name)"
        count = self._db.execute(f"SELECT count(*) {missing}").fetchone()[0]
        return count, [name for (name,) in self._db.execute(f"SELECT rows.name {missing} ORDER BY rows.name LIMIT 3")]

    def open(self, file: File) -> BinaryIO:
        """A file beside the pictures.  Raises BadSource, since what is said of pictures must be understood."""
        with _needed(file):
            return open_place(self.uri, file.place)

    def text(self, file: File) -> str:
        """Likewise all its text."""
        with _needed(file):
            data = self._span(file) if is_span(file.place) else read_item(self.uri, file.place)
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise not_utf8(file.name, error) from error

    def texts(self, wanted: Iterable[tuple[T, list[File]]]) -> Iterator[tuple[T, list[str]]]:
        """Likewise the texts of many small files, in their order.  Those of a bucket are asked for ahead, many at once."""
        if not self.uri.startswith(S3_SCHEME):
            yield from ((what, [self.text(file) for file in files]) for what, files in wanted)
            return
        pool, ahead = ThreadPoolExecutor(_THREADS), deque()
        try:
            for what, files in wanted:
                ahead.append((what, [self._asked(pool, file) for file in files]))
                if len(ahead) > _AHEAD:
                    yield _answered(*ahead.popleft())
            while ahead:
                yield _answered(*ahead.popleft())
        finally:
            pool.shutdown(cancel_futures=True)

    def _asked(self, pool: ThreadPoolExecutor, file: File) -> Callable[[], str]:
        """A tar's texts lie together: reading on is faster than asking for each."""
        return partial(self.text, file) if is_span(file.place) else pool.submit(self.text, file).result

    def _span(self, file: File) -> bytes:
        """Of an archive that stays open and is read ahead."""
        name, start, size = span_of(file.place)
        if self._opened is None or self._opened[0] != name:
            self.close()
            self._opened = name, open_at(self.uri, name)
        self._opened[1].seek(start)
        return self._opened[1].read(size)

    def close(self) -> None:
        """Let go of a file that was kept open; the list stays."""
        if self._opened:
            self._opened[1].close()
        self._opened = None


def _answered(what: T, answers: list[Callable[[], str]]) -> tuple[T, list[str]]:
    return what, [answer() for answer in answers]


@contextmanager
def _needed(file: File) -> Iterator[None]:
    """A file that cannot be read in the block is not set aside: what it says of others would be lost."""
    try:
        yield
    except (BadPicture, OSError) as error:
        if isinstance(error, StorageUnavailable):
            raise
        raise BadSource(f"{file.name} cannot be read: {error}") from error


def not_utf8(name: str, error: UnicodeDecodeError) -> BadSource:
    return BadSource(f"{name} is not UTF-8 ({error.reason} at byte {error.start}): save it as UTF-8")


def _key(name: str) -> str:
    folder, _, last = name.rpartition("/")
    return f"{folder}/{last.partition('.')[0]}"


def _chunks(values: Iterable) -> Iterator[list]:
    values = iter(values)
    while chunk := list(islice(values, _CHUNK)):
        yield chunk
