"""Where pictures come from: a folder or a .zip laid out as Hugging Face's imagefolder, or the embedded emoji.

Pictures lie in class folders (`cats/1.png`: the class is the nearest folder's name).  A `metadata.jsonl` or
`metadata.csv` in any folder may name its pictures (`file_name`, relative to itself) and give each a `text` (caption)
and a `label`, which wins over the folder.  Pictures with neither label nor folder are one class, `picture`.
Hidden files, `__MACOSX` and files that are no pictures by their extension are not looked at.
"""

import csv
import hashlib
import io
import json
import os
import stat
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from diffusion.data.images import BadPicture
from diffusion.recipe import canonical_json

EMBEDDED = "embedded"
SINGLE_CLASS = "picture"
_LONGEST_LABEL = 200  # characters
EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
MAX_FILE_BYTES = 2**28
_METADATA = ("metadata.jsonl", "metadata.csv")
_LAYOUT = (
    "Expected pictures (" + " ".join(EXTENSIONS) + ") in class folders, or beside a metadata.jsonl that names them"
)


class BadSource(ValueError):
    """A source that cannot be read as it stands.  The message says what to change."""


@dataclass(frozen=True)
class Item:
    """One file of a source.  `name` is its path inside, with '/'; `extra` holds the metadata's other columns."""

    name: str
    label: str
    caption: str = ""
    extra: dict = field(default_factory=dict, hash=False)
    mark: str = ""

    @property
    def place(self) -> str:
        return self.name

    @property
    def captions(self) -> tuple["Caption", ...]:
        return (Caption(self.caption, 1.0),) if self.caption else ()


class Caption(NamedTuple):
    text: str
    weight: float


@dataclass(frozen=True)
class Source:
    """What a source holds, sorted by name.  `fingerprint` changes whenever files or metadata may have changed; it is
    made from names, sizes and times or checksums, so it costs no reading of pictures (for work keys; not an identity).
    """

    location: Path
    listed: tuple[Item, ...]
    fingerprint: str

    @property
    def uri(self) -> str:
        return str(self.location)

    def items(self) -> Iterator[Item]:
        return iter(self.listed)

    def read(self, name: str) -> bytes:
        """The bytes of an item.  Raises BadPicture (unreadable, too large)."""
        return read_file(self.location, name)


def open_source(source: str | Path) -> Source:
    """ "embedded", a folder, or a .zip -> its list of pictures.  Raises BadSource; reads no picture."""
    if str(source) == EMBEDDED:
        location = Path(str(resources.files("diffusion.data") / "embedded" / "noto-emoji-64.zip"))
    else:
        location = Path(source).expanduser().resolve()
    if not location.exists():
        raise BadSource(f"source {source} does not exist: give a folder, a .zip, or the word {EMBEDDED!r}")
    if location.is_dir():
        files = dict(_walk(location))
    elif zipfile.is_zipfile(location):
        files = dict(_entries(location))
    else:
        raise BadSource(f"source {source} is neither a folder nor a .zip archive. {_LAYOUT}")
    rows = _read_metadata(location, files)
    if missing := sorted(rows.keys() - files.keys()):
        some = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise BadSource(
            f"source {source}: metadata names {len(missing)} files that are not there ({some}): add the files or remove"
            " their lines (file_name is relative to the metadata file)"
        )
    names = sorted(name for name in files if name in rows or PurePosixPath(name).suffix.lower() in EXTENSIONS)
    if not names:
        raise BadSource(f"source {source} holds no pictures. {_LAYOUT}")
    fingerprint = hashlib.sha256(json.dumps([sorted(files.items()), sorted(rows.items())]).encode()).hexdigest()
    return Source(location, _items(source, names, rows, files), fingerprint)


def read_item(uri: str, place: str) -> bytes:
    return read_file(Path(uri), place)


def read_file(location: Path, name: str) -> bytes:
    """The bytes of file `name` of the folder or archive at `location`.  Raises BadPicture (unreadable, too large)."""
    try:
        if location.is_dir():
            with open(location / name, "rb") as file:
                data = file.read(MAX_FILE_BYTES + 1)
        else:
            status = location.stat()
            with _archive(location, status.st_size, status.st_mtime_ns).open(name) as file:
                data = file.read(MAX_FILE_BYTES + 1)
    except (OSError, EOFError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        # RuntimeError covers zip entries with a password and (NotImplementedError) unknown compression
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise BadPicture("unreadable", f"{type(error).__name__}: {reason}") from error
    if len(data) > MAX_FILE_BYTES:
        raise BadPicture("too large", f"more than {MAX_FILE_BYTES:,} bytes")
    return data


@lru_cache(maxsize=2)
def _archive(location: Path, size: int, mtime_ns: int) -> zipfile.ZipFile:
    """An open archive, kept because its directory is read on opening; a changed file is another archive."""
    return zipfile.ZipFile(location)


def _walk(root: Path) -> Iterator[tuple[str, str]]:
    """(name, what changes with its content) of each file below `root`."""
    for parent, folders, names in os.walk(root):
        folders[:] = sorted(folder for folder in folders if not _hidden(folder))
        for folder in folders:
            if Path(parent, folder).is_symlink():
                raise BadSource(f"{Path(parent, folder)} is a link to a folder, which is not followed: {_COPY}")
        for name in names:
            if _hidden(name):
                continue
            path = Path(parent, name)
            inside = path.relative_to(root).as_posix()
            if path.is_symlink() and not path.resolve().is_relative_to(root):
                raise BadSource(f"{path} is a link out of the source, to {path.resolve()}: {_COPY}")
            try:
                status = path.stat()
                inside.encode()
            except UnicodeEncodeError as error:
                raise BadSource(f"{path!r}: the name is not UTF-8; rename the file") from error
            except OSError as error:
                raise BadSource(f"{path}: {error.strerror} (a broken link?); remove it") from error
            if not stat.S_ISREG(status.st_mode):
                raise BadSource(f"{path} is not a regular file: remove it from the source")
            yield inside, f"{status.st_size}:{status.st_mtime_ns}"


_COPY = "copy the pictures into the source, or give the real folder as the source"


def _entries(location: Path) -> Iterator[tuple[str, str]]:
    """(name, what changes with its content) of each file of an archive.  Refuses names that point out of it."""
    seen = set()
    try:
        entries = zipfile.ZipFile(location).infolist()
    except zipfile.BadZipFile as error:
        raise BadSource(
            f"{location} cannot be read as a zip archive ({error}): it may be cut off; copy it again"
        ) from error
    for entry in entries:
        name = entry.filename
        _check_inside(name, f"{location.name} holds an entry")
        if stat.S_ISLNK(entry.external_attr >> 16):
            raise BadSource(f"{location.name} holds the link {name!r}: pack the pictures themselves")
        if entry.is_dir() or any(_hidden(part) for part in PurePosixPath(name).parts):
            continue
        if name in seen:
            raise BadSource(f"{location.name} holds {name!r} twice: pack it again")
        seen.add(name)
        yield name, f"{entry.file_size}:{entry.CRC:08x}"


def _check_inside(name: str, what: str) -> None:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name or name[1:2] == ":":
        raise BadSource(f"{what} {name!r}: names must be relative, with '/', and stay inside the source")


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _read_metadata(location: Path, files: dict[str, str]) -> dict[str, dict]:
    """File name -> its row of metadata, over all metadata files of the source."""
    rows: dict[str, dict] = {}
    for metadata in sorted(name for name in files if PurePosixPath(name).name in _METADATA):
        text = _metadata_text(location, metadata)
        parse = _json_lines if metadata.endswith(".jsonl") else _csv_lines
        for number, row in parse(metadata, text):
            where = f"{metadata} line {number}"
            file_name = row.get("file_name")
            if not isinstance(file_name, str) or not file_name:
                raise BadSource(f'{where}: no file_name; each line names its picture, like {{"file_name": "1.png"}}')
            _check_inside(file_name, f"{where}: file_name")
            name = (PurePosixPath(metadata).parent / file_name).as_posix()
            if name in rows:
                raise BadSource(f"{where}: {name} has a line already: keep one")
            rows[name] = {**row, "where": where}
    return rows


def _metadata_text(location: Path, name: str) -> str:
    try:
        return read_file(location, name).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadSource(f"{name} is not UTF-8 ({error.reason} at byte {error.start}): save it as UTF-8") from error
    except BadPicture as error:
        raise BadSource(f"{name}: {error}") from error


def _json_lines(name: str, text: str) -> Iterator[tuple[int, dict]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            canonical_json([row])  # refuses NaN and half characters, which could not be written again
        except ValueError as error:
            raise BadSource(f"{name} line {number} is not JSON ({error})") from error
        if not isinstance(row, dict):
            raise BadSource(f"{name} line {number} is not a JSON object")
        yield number, row


def _csv_lines(name: str, text: str) -> Iterator[tuple[int, dict]]:
    rows = csv.DictReader(io.StringIO(text, newline=""))
    try:
        for row in rows:
            if None in row:
                raise BadSource(f"{name} line {rows.line_num} has more fields than the header")
            yield rows.line_num, row
    except csv.Error as error:
        raise BadSource(f"{name} line {rows.line_num}: {error}") from error


def _items(source: str | Path, names: list[str], rows: dict[str, dict], files: dict) -> tuple[Item, ...]:
    items, unlabelled = [], []
    for name in names:
        row = dict(rows.get(name, {}))
        where = row.pop("where", name)
        row.pop("file_name", None)
        label = row.pop("label", None)
        caption = row.pop("text", None)
        if isinstance(label, int) and not isinstance(label, bool):
            label = str(label)
        for field_name, value in (("label", label), ("text", caption)):
            if not isinstance(value, str | None):
                raise BadSource(f"{where}: {field_name} is {value!r}; it must be a string")
        label = label or PurePosixPath(name).parent.name
        if not label.isprintable() or set(label) & set("/\\") or len(label) > _LONGEST_LABEL:
            raise BadSource(
                f"source {source}: {name} has the label {label[:80]!r}: a class name is up to {_LONGEST_LABEL} printable"
                " characters without slashes"
            )
        if not label:
            unlabelled.append(name)
        items.append(Item(name, label or SINGLE_CLASS, caption or "", row, files[name]))
    if unlabelled and len(unlabelled) < len(names):
        raise BadSource(
            f"source {source}: {len(unlabelled)} of {len(names)} pictures have no class (first: {unlabelled[0]}): move"
            " them into class folders or give them a label in metadata.jsonl"
        )
    return tuple(items)
