"""Reading: any worker, knowing a source's URI and an item's place, has the bytes.  Nothing else is needed or remembered.

A place is a JSON list: how to read, the file that holds it, and numbers.  The file is relative to the URI ("" is the URI
itself), or given in full where a source spans several places.  Every way of reading is one function here:

    file      a file of its own
    span      a stretch of an uncompressed archive (tar)
    gz        a stretch of a .gz, which has no random access: each process unpacks it once, to a temporary file
    zip       an entry of a zip: its header's offset is in the place, so the archive's directory is not read again
    row       a value of a Parquet table
    grey      raw 8-bit grey pixels of an IDX file, which become a PNG
    refused   a file that was listed and cannot be used, with the reason
"""

import errno
import io
import json
import lzma
import os
import tempfile
import zipfile
import zlib
from functools import lru_cache
from typing import BinaryIO, NamedTuple

import numpy as np

from diffusion.data.pictures.bad_picture import UNREADABLE, BadPicture
from diffusion.data.pictures.encode import encode_png
from diffusion.data.sources.items import MAX_FILE_BYTES, BadSource
from diffusion.store.storage import S3_SCHEME, LocalFolder, Storage, StorageUnavailable, open_plain, open_storage

ENCRYPTED = 1  # of a zip entry's flags
_LOCAL_HEADER = 30  # bytes of a zip entry before its name
_SLACK = 512  # bytes read beyond a zip entry, since its local header may be longer than the directory's
_BLOCK = 2**20  # bytes of a ranged read
_FREE = 2**30  # bytes that anything may unpack to
_RATIO = 100  # beyond them: unpacked bytes to packed ones
# RuntimeError: a Python without bz2 or lzma; OverflowError: offsets that no file has
_UNREADABLE = (
    OSError,
    EOFError,
    RuntimeError,
    OverflowError,
    IndexError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
)

_compact = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode


class Placed(NamedTuple):
    """A file on its storage."""

    storage: Storage
    name: str

    def size(self) -> int | None:
        return self.storage.size(self.name)


def place(how: str, file: str, *rest: int | str | None) -> str:
    return _compact([how, file, *rest])


def refused(kind: str, detail: str, original: str | None = None) -> str:
    """The place of a file that cannot be used.  original: the place of its bytes, where they could be read."""
    # ASCII: the original's name may be what cannot be written down
    return json.dumps(["refused", "", kind, detail, original], separators=(",", ":"))


def is_refused(place: str) -> bool:
    return place.startswith('["refused"')


def original_of(place: str) -> str:
    """The place of a file's bytes, also of one that is refused for its name alone."""
    return (json.loads(place)[4] if is_refused(place) else None) or place


def is_span(place: str) -> bool:
    return place.startswith('["span"')


def span_of(place: str) -> tuple[str, int, int]:
    """(file, start, size) of a span that is not too large.  Raises BadPicture."""
    _, file, start, size = json.loads(place)
    return file, start, _bounded(size)


def file_of(place: str) -> str:
    """The file of a place, as it is written there."""
    return json.loads(place)[1]


def read_item(uri: str, place: str) -> bytes:
    """The bytes of the item at `place` of the source at `uri`.  Raises BadPicture (unreadable, too large, and what the
    listing found); StorageUnavailable and StorageRefused pass.
    """
    how, file, *rest = json.loads(place)
    try:
        data = _READERS[how](uri, file, *rest)
    except StorageUnavailable:
        raise
    except _UNREADABLE as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise BadPicture(UNREADABLE, f"{type(error).__name__}: {reason}") from error
    if len(data) > MAX_FILE_BYTES:
        raise too_large()
    return data


def too_large() -> BadPicture:
    return BadPicture("too large", f"more than {MAX_FILE_BYTES:,} bytes")


def located(uri: str, file: str = "") -> Placed:
    """Where a place's file is."""
    if file.startswith(("/", S3_SCHEME)):
        uri, file = file, ""
    if not file:
        uri, _, file = uri.rpartition("/")
    return Placed(storage_at(uri or "/"), file)


@lru_cache(maxsize=16)
def storage_at(uri: str) -> Storage:
    """A folder or prefix, in which other people have named the files."""
    if uri.startswith(S3_SCHEME):
        from diffusion.store.s3 import S3Prefix, any_name

        return S3Prefix(uri, check=any_name)
    return open_storage(uri)


def stretch(uri: str, file: str, start: int, size: int) -> bytes:
    """`size` bytes from `start`, fewer at the end.  One local file that may not be read is no refusal of its storage."""
    placed = located(uri, file)
    if isinstance(placed.storage, LocalFolder):
        with open_at(uri, file) as opened:
            opened.seek(start)
            return opened.read(size)
    return placed.storage.read(placed.name, start, size)


def open_at(uri: str, file: str) -> BinaryIO:
    """A place's file to read and seek in, wherever it lies.  Raises FileNotFoundError."""
    placed = located(uri, file)
    if not isinstance(placed.storage, LocalFolder):
        return io.BufferedReader(Ranged(placed), _BLOCK)
    if not file or file.startswith("/"):  # named by people, who may name a link
        return open(placed.storage.folder / placed.name, "rb", opener=open_plain)  # by any name that its folder lists
    return _open_listed(placed, file)


# who may pass through a folder need not see what is in it
_FOLDER = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY


def _open_listed(placed: Placed, file: str) -> BinaryIO:
    """A file that the listing of a source found.  A link that came in its place since, or in that of a folder between it and
    the source, is not followed: it may lead out of the source.  Of a file that is named in full, by a table, its own place
    alone is looked at.
    """
    *folders, name = placed.name.split("/")
    within = os.open(placed.storage.folder, _FOLDER)
    try:
        for folder in folders:
            deeper = os.open(folder, _FOLDER | os.O_NOFOLLOW, dir_fd=within)
            os.close(within)
            within = deeper
        return open(open_plain(name, os.O_RDONLY | os.O_NOFOLLOW, within), "rb")
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            raise OSError(error.errno, "it has become a link since it was listed", file) from error
        raise
    finally:
        os.close(within)


class Ranged(io.RawIOBase):
    """An object of a storage as a file: each read is one ranged request."""

    def __init__(self, placed: Placed) -> None:
        length = placed.size()
        if length is None:
            raise FileNotFoundError(placed.name)
        self._placed, self._length, self._at = placed, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._length)[whence]
        return self._at

    def readinto(self, buffer: memoryview) -> int:
        wanted = min(len(buffer), self._length - self._at)
        if wanted <= 0:
            return 0
        data = self._placed.storage.read(self._placed.name, self._at, wanted)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def open_place(uri: str, place: str) -> BinaryIO:
    """What lies at a place, as a file.  A file of its own may have any size, all else as in `read_item`."""
    how, file, *_ = json.loads(place)
    if how != "file":
        return io.BytesIO(read_item(uri, place))
    return open_at(uri, file)


def explodes(unpacked: int, packed: int) -> bool:
    """Whether an archive claims more than pictures do: their formats are compressed already."""
    return unpacked > _FREE and unpacked > _RATIO * packed


@lru_cache(maxsize=2)
def unpacked(uri: str, file: str, mark: str) -> BinaryIO:
    """A .gz as a temporary file of its contents, made once per process.  Raises BadSource (cut off, damaged, explodes)."""
    placed = located(uri, file)
    plain = tempfile.TemporaryFile(prefix="diffusion-")  # noqa: SIM115
    size, packed = 0, placed.size() or 0
    with open_at(uri, file) as packed_file:
        inflate, chunk = zlib.decompressobj(wbits=31), b""
        try:
            while chunk := chunk or packed_file.read(_BLOCK):
                if inflate.eof:  # a .gz may be several in a row, and zeros at its end
                    chunk = chunk.lstrip(b"\0")
                    if not chunk:
                        continue
                    inflate = zlib.decompressobj(wbits=31)
                size += plain.write(inflate.decompress(chunk, _BLOCK))
                chunk = inflate.unused_data if inflate.eof else inflate.unconsumed_tail
                if explodes(size, packed):
                    raise BadSource(f"{placed.name} explodes: {packed:,} bytes unpack to more than {size:,}")
        except zlib.error as error:
            raise BadSource(f"{placed.name} is damaged ({error}): copy it again") from error
        except OSError as error:
            if isinstance(error, StorageUnavailable):
                raise
            raise BadSource(
                f"{placed.name} cannot be unpacked to {tempfile.gettempdir()} ({error.strerror}): make room, set TMPDIR to"
                " another folder, or unpack it yourself"
            ) from error
    if not inflate.eof:
        raise BadSource(f"{placed.name} is cut off: copy it again")
    plain.flush()
    return plain


def _file(uri: str, file: str) -> bytes:
    placed = located(uri, file)
    if not isinstance(placed.storage, LocalFolder):
        return placed.storage.read(placed.name, 0, MAX_FILE_BYTES + 1)
    with _open_listed(placed, file) as opened:
        return opened.read(MAX_FILE_BYTES + 1)


def _span(uri: str, file: str, start: int, size: int) -> bytes:
    return _whole(stretch(uri, file, start, _bounded(size)), size)


def _gz(uri: str, file: str, mark: str, start: int, size: int) -> bytes:
    return _whole(os.pread(unpacked(uri, file, mark).fileno(), _bounded(size), start), size)


def _bounded(size: int) -> int:
    if size > MAX_FILE_BYTES:
        raise too_large()
    return size


def _whole(data: bytes, size: int) -> bytes:
    if len(data) != size:
        raise EOFError(f"{len(data):,} of {size:,} bytes are there: the archive has changed since it was listed")
    return data


def _zip(
    uri: str, file: str, name: str, offset: int, compressed: int, size: int, method: int, flags: int, crc: int
) -> bytes:
    if flags & ENCRYPTED:
        raise BadPicture("encrypted", "pack the archive without a password")
    head = _LOCAL_HEADER + len(name.encode("utf-8", "surrogateescape")) + _SLACK
    data = stretch(uri, file, offset, head + _bounded(compressed))
    if len(data) < _LOCAL_HEADER or data[:4] != b"PK\3\4":
        raise zipfile.BadZipFile("no entry begins where the archive's directory says")
    head = _LOCAL_HEADER + int.from_bytes(data[26:28], "little") + int.from_bytes(data[28:30], "little")
    if len(data) < head + compressed:
        data = stretch(uri, file, offset, head + compressed)
    entry = zipfile.ZipInfo(name)
    entry.compress_type, entry.compress_size, entry.file_size, entry.CRC = method, compressed, size, crc
    try:
        with zipfile.ZipExtFile(io.BytesIO(data[head : head + compressed]), "r", entry) as packed:
            return packed.read(MAX_FILE_BYTES + 1)
    except NotImplementedError as error:  # as it is packed, it stays so, and is not tried again
        raise BadPicture("unknown compression", f"{error}: pack the archive with deflate, bzip2 or LZMA") from error


def _row(uri: str, file: str, mark: str, group: int, row: int, column: str, field: str | None) -> bytes:
    value = _column(uri, file, mark, group, column, field)[row].as_py()
    if value is None:
        raise BadPicture("empty", "the table has no picture in this row")
    return value


@lru_cache(maxsize=1)
def _column(uri: str, file: str, mark: str, group: int, column: str, field: str | None):
    """The bytes of one row group of a Parquet table: items are read in order, so the next are in it too."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    try:
        with open_at(uri, file) as opened:
            table = pq.ParquetFile(opened).read_row_group(
                group, columns=[column if field is None else f"{column}.{field}"]
            )
    except pa.ArrowException as error:
        raise BadPicture(UNREADABLE, f"{type(error).__name__}: {error}") from error
    values = table.column(column)
    return values if field is None else pc.struct_field(values, field)


def _grey(uri: str, file: str, mark: str | None, start: int, height: int, width: int) -> bytes:
    read = _span(uri, file, start, height * width) if mark is None else _gz(uri, file, mark, start, height * width)
    grey = np.frombuffer(read, np.uint8).reshape(height, width, 1)
    return encode_png(np.repeat(grey, 3, axis=2))


def _refused(uri: str, file: str, kind: str, detail: str, original: str | None) -> bytes:
    raise BadPicture(kind, detail)


_READERS = {
    "file": _file,
    "span": _span,
    "gz": _gz,
    "zip": _zip,
    "row": _row,
    "grey": _grey,
    "refused": _refused,
}
