"""What all kinds of sources share: items, captions, the rules for names and labels, and what a row of metadata says.

Which refusal is which: what is wrong with the source as a whole (names that lead out of it, links, duplicates, archives
that are cut off or explode, metadata that cannot be understood) is BadSource, for people to change before anything is
made of it.  What is wrong with one file (its bytes, its password, a name that cannot be written down) is BadPicture when
that file is read, so the file is set aside with its reason and the others go on.
"""

import hashlib
import math
import posixpath
import re
from dataclasses import dataclass, field
from typing import NamedTuple

from diffusion.recipe import Columns, canonical_json

SINGLE_CLASS = "picture"
EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
MAX_FILE_BYTES = 2**28
MAX_LABELS = 100_000  # more distinct labels than this are surely captions or names in the wrong column
_LEAST_WEIGHT, _LARGEST_WEIGHT = 1e-9, 1e9  # sums of such are exact enough to draw by, and finite
_LONGEST_LABEL = 200  # characters
_LONGEST_NAME = 1024  # bytes
NO_PARTS = {"", ".", ".."}  # that no name in a folder has between its slashes, and a key in a bucket may have
_LAYOUT = dict.fromkeys(map(ord, "\t\n\r"))
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_IMAGE = ("image", "path", "file_name", "filename", "file", "image_path", "filepath", "img", "jpg", "png", "webp")
_CAPTIONS = ("text", "texts", "caption", "captions", "txt")
_LABEL = ("label", "class", "class_name")
_WEIGHTS = ("weights", "weight")


class BadSource(ValueError):
    """A source that cannot be read as it stands.  The message says what to change."""


class Caption(NamedTuple):
    """A text of a picture.  Where a picture has several, each is chosen in proportion to its weight."""

    text: str
    weight: float = 1.0


@dataclass(frozen=True)
class Item:
    """One picture of a source.

    `name` is its path inside, with '/', and unique; `place` tells `read_item` where its bytes are; `mark` changes whenever
    they may have; `size` is their number where it is known without reading them; `extra` holds the metadata's other columns.
    """

    name: str
    place: str
    mark: str
    label: str
    captions: tuple[Caption, ...] = ()
    extra: dict = field(default_factory=dict, hash=False)
    size: int | None = None


class File(NamedTuple):
    """One file of a folder, archive or prefix.  `name` is unique in the source; the last part of it, `inside`, is the path
    in the file's own archive, whose nearest folder is the class.
    """

    name: str
    inside: str
    size: int
    mark: str
    place: str


USUAL = Columns()


def named(columns: Columns) -> set[str]:
    """The columns that are named, which a table must have."""
    return {name for name in (columns.image, columns.label, *columns.captions, *columns.weights) if name}


def image_column(columns: Columns, present: dict | set | list) -> str | None:
    """The column of paths or pictures: the one named, or the first usual one that is there."""
    return columns.image or _first(_IMAGE, present)


def label_column(columns: Columns, present: dict | set | list) -> str | None:
    """Likewise of labels."""
    return columns.label or _first(_LABEL, present)


def caption_columns(columns: Columns, present: dict | set | list) -> list[tuple[str, str | None]]:
    """Likewise (column of captions, column of their weights) pairs."""
    if columns.captions:
        return list(zip(columns.captions, columns.weights or (None,) * len(columns.captions), strict=True))
    usual = _first(_CAPTIONS, present)
    return [(usual, _first(_WEIGHTS, present))] if usual else []


def said_columns(columns: Columns, present: list[str]) -> list[str]:
    """The columns among those present that labels, captions and weights are read from."""
    used = (label_column(columns, present), *(name for pair in caption_columns(columns, present) for name in pair))
    return [name for name in used if name in present]


def _first(usual: tuple[str, ...], present: dict | set | list) -> str | None:
    return next((name for name in usual if name in present), None)


def hidden(name: str) -> bool:
    """Whether a file or folder is not looked at."""
    return name.startswith(".") or name == "__MACOSX"


def suffix(name: str) -> str:
    return posixpath.splitext(name)[1].lower()


def check_inside(name: str, what: str) -> None:
    """Raises BadSource where a name leads out of its source.  what: the start of the message."""
    if name.startswith("/") or ".." in name.split("/") or "\\" in name or "\0" in name or name[1:2] == ":":
        raise BadSource(f"{what} {name!r}: names must be relative, with '/', and stay inside the source")


def unsafe(name: str) -> str | None:
    """Why a name cannot be written down; None where it can."""
    if control := _CONTROL.search(name):
        if "\ud800" <= control[0] <= "\udfff":
            return "the name is not UTF-8"
        return f"the name holds the control character {control[0]!r}"
    if "\\" in name:
        return "the name holds a backslash, which elsewhere separates folders"
    if NO_PARTS & set(name.split("/")):
        return "the name has '//', '.' or '..' in it, which would lead elsewhere in a folder"
    if len(name.encode()) > _LONGEST_NAME:
        return f"the name has {len(name.encode()):,} bytes, more than {_LONGEST_NAME:,}"
    return None


def holds_control(text: str) -> bool:
    """Whether a text has control characters beside tabs and the ends of lines."""
    return _CONTROL.search(text.translate(_LAYOUT)) is not None


def written(name: str) -> str:
    """An unsafe name as text that can be printed and stored, cut where it is too long; other names give other texts."""
    raw = name.encode("utf-8", "surrogateescape")
    parts = raw.decode("utf-8", "backslashreplace").split("/")
    *folders, last = ["".join(f"\\x{ord(c):02x}" for c in part) if part in NO_PARTS else part for part in parts]
    folder = "/".join(filter(None, folders))
    plain = [_CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", part)[:100] for part in (folder, last)]
    return "/".join(filter(None, plain)) + f"~{hashlib.sha256(raw).hexdigest()[:16]}{suffix(last)[:8]}"


def item_of(
    file: File,
    row: dict,
    where: str,
    *,
    columns: Columns = USUAL,
    caption: str = "",
    label: str = "",
    folder: bool = True,
) -> Item:
    """An item from its file and what is said of it.  A row of metadata wins over `caption` and `label`, which lie in files
    beside the picture, and these win over the nearest folder; `folder` False: folders are no classes.

    where: what to call the row in a refusal.  Raises BadSource.
    """
    row = dict(row)
    captions = []
    for texts, weights in caption_columns(columns, row):
        captions += _captions(row.pop(texts, None), row.pop(weights, None) if weights else None, f"{where}: {texts}")
    labels = label_column(columns, row)
    said = _label(row.pop(labels, None), where) if labels else ""
    if not captions and caption:
        captions = [Caption(caption)]
    nearest = posixpath.basename(posixpath.dirname(file.inside)) if folder else ""
    return Item(file.name, file.place, file.mark, said or label or nearest, tuple(captions), row, file.size)


def is_label(text: str) -> bool:
    """Whether a text can be the name of a class."""
    plain = text.isprintable() and text == text.strip() and not set(text) & set("/\\")
    return plain and 0 < len(text) <= _LONGEST_LABEL


def check_label(label: str, name: str) -> None:
    """Raises BadSource where a label cannot be the name of a class."""
    if not is_label(label):
        raise BadSource(
            f"{name} has the label {label[:80]!r}: a class name is up to {_LONGEST_LABEL} printable characters without"
            " slashes, and without blanks at its ends. Rename its folder, or give it another label"
        )


def _label(value: object, where: str) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str | None):
        raise BadSource(f"{where}: label is {value!r}; it must be a string or a whole number")
    return value or ""


def _captions(value: object, weights: object, where: str) -> list[Caption]:
    """A string, {"text", "weight"}, or a list of either, with a weight or a list of weights beside -> captions.  Texts that
    are empty are none.
    """
    values = value if isinstance(value, list | tuple) else [value]
    given = weights if isinstance(weights, list | tuple) else [weights] * len(values)
    if len(given) != len(values):
        raise BadSource(f"{where} has {len(values)} texts and {len(given)} weights: give one weight each")
    captions = []
    for text, weight in zip(values, given, strict=True):
        if isinstance(text, dict):
            if unknown := set(text) - {"text", "weight"}:
                raise BadSource(
                    f'{where} has the key {sorted(unknown)[0]!r}; a caption is {{"text": ..., "weight": ...}}'
                )
            text, weight = text.get("text"), text.get("weight", weight)
        if not isinstance(text, str | None):
            raise BadSource(f"{where} is {value!r}; it must be a string, or a list of strings or of texts with weights")
        if text:
            captions.append(Caption(text, _weight(weight, where)))
    return captions


def _weight(value: object, where: str) -> float:
    if value is None or value == "":
        return 1.0
    try:
        number = math.nan if isinstance(value, bool) else float(value)  # CSV holds texts
    except (TypeError, ValueError):
        number = math.nan
    if not _LEAST_WEIGHT <= number <= _LARGEST_WEIGHT:
        raise BadSource(
            f"{where} has the weight {value!r}; a weight is a number from {_LEAST_WEIGHT:g} to {_LARGEST_WEIGHT:g}, of"
            " which only shares count"
        )
    return number


def identity(item: Item) -> bytes:
    """What of an item enters the fingerprint: all but where its bytes are."""
    captions = [list(caption) for caption in item.captions]
    return canonical_json([item.name, item.mark, item.label, captions, item.extra])
