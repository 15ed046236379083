"""Opening a source: what kind it is, from its name and what lies in it, and its list."""

import posixpath
import re
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Iterator
from importlib import resources
from itertools import islice
from pathlib import Path

from diffusion.data.sources import idx
from diffusion.data.sources.containers import ARCHIVES, archive_files, folder_files, local_mark
from diffusion.data.sources.items import EXTENSIONS, BadSource, File, Item, holds_control, suffix
from diffusion.data.sources.layouts import EXPECTED, STATS, items_of
from diffusion.data.sources.listing import Listing
from diffusion.data.sources.patterns import SPECIAL, matching
from diffusion.data.sources.places import file_of, located, place, storage_at
from diffusion.data.sources.tables import TABLES, table_items
from diffusion.recipe import Columns
from diffusion.store.scrub import holds_password
from diffusion.store.storage import S3_SCHEME, LocalFolder, StorageUnavailable

EMBEDDED = "embedded"
EMBEDDED_LICENCE = "Noto Emoji, Copyright Google LLC, Apache-2.0; flags in the public domain or exempt"
KINDS = (
    "a folder, a .zip, .tar or .tar.gz, a pattern of them ('shards/{000..012}.tar', 'shards/*.tar'), a table"
    f" ({' '.join(TABLES)}), an IDX file, s3://bucket/prefix, or the word {EMBEDDED!r}"
)
_PARQUET = re.compile(r"\.parquet$", re.IGNORECASE)


class Source:
    """An opened source.  `kind` is for people; `fingerprint` changes whenever files or metadata may have changed: it is
    made from names, marks and metadata, so it costs no reading of pictures (for work keys; not an identity).
    """

    def __init__(self, uri: str, kind: str, listing: Listing) -> None:
        self.uri, self.kind, self.listing = uri, kind, listing
        self.fingerprint = listing.fingerprint

    def __len__(self) -> int:
        return self.listing.count("items")

    def items(self) -> Iterator[Item]:
        """The pictures, sorted by name.  Any number of times; nothing is held in memory."""
        return self.listing.items()


def describe(source: Source, *, names: int = 5) -> dict:
    """What `--dry-run` says of a source, in one pass: kind, number of pictures and bytes (None: not known without reading
    them), classes with counts, formats by extension, pictures with a caption, with several and with control characters in
    one, captions in all, the first `names` names, what is left out and why, and other files by extension.
    """
    formats: Counter[str] = Counter()
    captioned = several = captions = unprintable = 0
    for item in source.items():
        formats[suffix(item.name) or "(none)"] += 1
        captioned += bool(item.captions)
        several += len(item.captions) > 1
        captions += len(item.captions)
        unprintable += any(holds_control(caption.text) for caption in item.captions)
    listing = source.listing
    return {
        "uri": source.uri,
        "kind": source.kind,
        "pictures": len(source),
        "bytes": listing.bytes,
        "classes": dict(sorted(listing.labels.items())),
        "formats": dict(sorted(formats.items())),
        "captioned": captioned,
        "with several captions": several,
        "captions": captions,
        "captions with control characters": unprintable,
        "first": [item.name for item in islice(source.items(), names)],
        "left out": dict(sorted(listing.left_out.items())),
        "other files": {key or "(none)": n for key, n in sorted(listing.suffixes.items()) if key not in EXTENSIONS},
    }


def open_source(source: str | Path, *, columns: Columns | None = None) -> Source:
    """Anything that `docs/sources.md` lists -> its pictures.  columns: of a table.

    Raises BadSource; StorageRefused and StorageUnavailable pass.  Reads no picture.
    """
    try:
        uri = uri_of(str(source))
        listing = Listing(uri)
        kind, items = _kind(listing, uri, columns)
        listing.add_items(items)
        listing.close()
    except StorageUnavailable:
        raise
    except OSError as error:
        raise BadSource(f"source {source} cannot be read: {error}") from error
    except sqlite3.OperationalError as error:
        raise BadSource(
            f"the list of source {source} cannot be kept ({error}): make room in {tempfile.gettempdir()}, or set TMPDIR"
        ) from error
    if not listing.count("items"):
        if kind.endswith(("table", "tables")):
            raise BadSource(f"source {source} has no rows: give a table with a row for each picture")
        raise BadSource(f"source {source} holds no pictures. {EXPECTED}")
    return Source(uri, kind, listing)


def uri_of(source: str) -> str:
    """A source's one name.  Raises BadSource for one that cannot be read from where it is."""
    if source == EMBEDDED:
        return str(resources.files("diffusion.data") / "embedded" / "noto-emoji-64.zip")
    if holds_password(source):  # before anything repeats it
        raise BadSource(
            "a source's address holds no password, for Prefect and datasets keep it: leave it out; a bucket's keys are"
            " AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    if source.startswith(S3_SCHEME):
        if not source.removeprefix(S3_SCHEME).strip("/"):
            raise BadSource(f"source {source} names no bucket: give s3://bucket/prefix")
        return source.rstrip("/")
    if source.startswith("pipe:"):
        raise BadSource(f"source {source!r} is a command, and none is run: give {KINDS}")
    if "://" in source:
        raise BadSource(f"source {source} cannot be read from there: copy it to a folder or a bucket, and give {KINDS}")
    path = Path(source).expanduser()
    return str(path.resolve()) if path.exists() else str(path.absolute())


def _kind(listing: Listing, uri: str, columns: Columns | None) -> tuple[str, Iterator[Item]]:
    """What people call the source, and its items."""
    remote = uri.startswith(S3_SCHEME)
    if SPECIAL.search(uri) and (remote or not Path(uri).exists()):
        return _of_files(listing, matching(uri), columns, uri)
    if not remote and not Path(uri).exists():
        raise BadSource(f"source {uri} does not exist: give {KINDS}")
    if Path(uri).is_dir() if not remote else not _known(uri):
        return _of_folder(listing, uri, columns)
    if not _known(uri):
        raise BadSource(
            f"source {uri} is neither a folder nor a .zip archive, nor anything else that is known: give {KINDS}"
        )
    name = posixpath.basename(uri)
    files = [_at(uri, "")]
    if idx.IMAGES.search(name):
        labels = (located(uri).storage.uri.rstrip("/") + "/" + label for label in idx.labels_of(name))
        files += filter(None, (_at(label, label) for label in labels))
    if files[0] is None:
        raise BadSource(f"source {uri} does not exist: give {KINDS}")
    return _of_files(listing, files, columns, uri)


def _known(name: str) -> bool:
    return bool(ARCHIVES.search(name) or idx.IMAGES.search(name) or suffix(name) in TABLES)


def _at(uri: str, written: str) -> File | None:
    """The file at a URI, if there is one.  written: as places shall have it."""
    storage, name = located(uri)
    if isinstance(storage, LocalFolder):
        if not Path(uri).exists():
            return None
        size, mark, _ = local_mark(uri, Path(uri).parent)
    else:
        found = next((found for found in storage.walk(name) if found.name == name), None)
        if found is None:
            return None
        size, mark = found.size, found.mark
    return File(name, name, size, mark, place("file", written))


def _of_folder(listing: Listing, uri: str, columns: Columns | None) -> tuple[str, Iterator[Item]]:
    listing.add_files(folder_files(storage_at(uri)), uri)
    pictures = sum(listing.suffixes[ending] for ending in EXTENSIONS)
    archives, images, labels, tables = [], [], [], []
    for file in listing.files() if set(listing.suffixes) - set(EXTENSIONS) else ():
        for pattern, of_kind in ((ARCHIVES, archives), (idx.IMAGES, images), (idx.LABELS, labels), (_PARQUET, tables)):
            if pattern.search(file.name):
                of_kind.append(file)
    stats = any(STATS.search(file.name) for file in listing.files()) if listing.suffixes[".json"] else False
    holds = {"pictures": pictures, "archives": len(archives), "IDX files": len(images)}
    if sum(map(bool, holds.values())) > 1:
        what = " and ".join(f"{count} {name}" for name, count in holds.items() if count)
        raise BadSource(
            f"source {uri} holds {what}: which are the source? Give a folder with one kind, or name the archives by a"
            " pattern, as in 'folder/*.tar'"
        )
    if archives or images or (tables and not pictures):
        listing.forget_files()
        return _of_files(listing, archives or (images and images + labels) or tables, columns, uri, stats=stats)
    _no_columns(columns, uri)
    layout, items = items_of(listing, archived=False, stats=stats)
    return f"folder, {layout}", items


def _of_files(
    listing: Listing, files: list[File], columns: Columns | None, uri: str, *, stats: bool = False
) -> tuple[str, Iterator[Item]]:
    """The items of one or more archives, IDX files or tables."""
    archives = [file for file in files if ARCHIVES.search(file.name)]
    images = [file for file in files if idx.IMAGES.search(file.name) or idx.LABELS.search(file.name)]
    tables = [file for file in files if suffix(file.name) in TABLES]
    if len(files) not in (len(archives), len(images), len(tables)):
        raise BadSource(f"source {uri} names files of several kinds, or of none that is known: give {KINDS}")
    if tables:
        return f"{len(tables)} table{'s' * (len(tables) > 1)}", table_items(listing, tables, columns or Columns())
    _no_columns(columns, uri)
    if images:
        return "IDX", idx.idx_items(listing, files)
    for file in archives:
        prefix = "" if not file_of(file.place) else ARCHIVES.sub("", file.name) + "/"
        listing.add_files(archive_files(uri, file_of(file.place), file.mark, prefix), file.name)
    endings = {ARCHIVES.search(file.name)[0].lower() for file in archives}
    layout, items = items_of(listing, archived=not endings & {".zip"}, stats=stats)
    count = f"{len(archives)} " if len(archives) > 1 else ""
    return f"{count}{' '.join(sorted(endings))}, {layout}", items


def _no_columns(columns: Columns | None, uri: str) -> None:
    if columns not in (None, Columns()):
        raise BadSource(f"source {uri} is no table, so it has no columns to name: give a {', '.join(TABLES)}")
