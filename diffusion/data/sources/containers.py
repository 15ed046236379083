"""What holds files: a local folder, an S3 prefix, a zip, a tar.  Each is a stream of `File`; what could lead out is refused.

Memory: a folder's names are held one folder at a time; a zip's directory and a tar's headers are read as they pass, and
nothing of them is held.
"""

import os
import posixpath
import re
import stat
import struct
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from diffusion.data.pictures.bad_picture import UNSAFE_NAME
from diffusion.data.sources.items import NO_PARTS, BadSource, File, check_inside, hidden, unsafe, written
from diffusion.data.sources.places import ENCRYPTED, explodes, located, open_at, place, refused, unpacked
from diffusion.store.storage import LocalFolder, Storage

ARCHIVES = re.compile(r"\.(zip|tar|tar\.gz|tgz)$", re.IGNORECASE)
MAX_ENTRIES = 10_000_000  # of one archive
_MAX_HEADER = 2**24  # bytes that a tar's header may ask to be read at once
_COPY = "copy the pictures into the source, or give the real folder as the source"
_PACK = "pack the pictures themselves"


def checked(prefix: str, inside: str, size: int, mark: str, where: str) -> File:
    """A file, refused with its reason where its name cannot be written down.  `prefix` begins its name."""
    if why := unsafe(inside):
        inside, where = written(inside), refused(UNSAFE_NAME, why, where)
    return File(prefix + inside, inside, size, mark, where)


def folder_files(storage: Storage) -> Iterator[File]:
    """Every file below a folder or prefix that is not hidden, sorted by name."""
    if not isinstance(storage, LocalFolder):
        for name, size, mark in _remote_files(storage):
            yield checked("", name, size, mark, place("file", name))
        return
    for name, size, mark, real in _local_files(storage.folder):
        yield checked("", name, size, mark, place("file", real))


def _remote_files(storage: Storage) -> Iterator[tuple[str, int, str]]:
    for name, size, mark in storage.walk():
        if not any(map(hidden, set(name.split("/")) - NO_PARTS)):
            yield name, size, mark


def _local_files(root: Path) -> Iterator[tuple[str, int, str, str]]:
    """(name, size, mark, name of what is read): these differ where the file is a link, which only the listing follows."""
    pending, below = [_entries(root)], len(os.path.join(root, ""))
    while pending:
        entry = next(pending[-1], None)
        if entry is None:
            pending.pop()
        elif hidden(entry.name):
            continue
        elif entry.is_dir():
            if entry.is_symlink():
                raise BadSource(f"{entry.path} is a link to a folder, which is not followed: {_COPY}")
            pending.append(_entries(Path(entry.path)))
        else:
            try:
                size, mark, real = local_mark(entry.path, root)
            except OSError as error:
                raise BadSource(f"{entry.path}: {error.strerror}; is the source being changed?") from error
            yield entry.path[below:], size, mark, real[below:]


def _entries(folder: Path) -> Iterator[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            # "a.b" sorts before "a/b", as whole names do
            return iter(sorted(entries, key=lambda entry: entry.name + "/" * entry.is_dir()))
    except OSError as error:
        raise BadSource(f"{folder} cannot be listed ({error.strerror}): allow it, or move the folder away") from error


def local_mark(path: str | Path, root: Path) -> tuple[int, str, str]:
    """Size and mark of a file that really lies below `root`, and where it is read: where a link leads, which is followed
    this once.  Raises BadSource; FileNotFoundError where nothing is.
    """
    path, linked = str(path), os.path.islink(path)
    real = os.path.realpath(path) if linked else path
    if linked and not Path(real).is_relative_to(os.path.realpath(root)):
        raise BadSource(f"{path} is a link out of the source, to {real}: {_COPY}")
    try:
        status = os.stat(real)
    except OSError as error:
        if not linked:
            raise
        raise BadSource(f"{path}: {error.strerror} (a broken link?); remove it") from error
    if not stat.S_ISREG(status.st_mode):
        raise BadSource(f"{path} is not a regular file: remove it from the source")
    return status.st_size, f"{status.st_size}:{status.st_mtime_ns}", real


def archive_files(uri: str, file: str, mark: str, prefix: str = "") -> Iterator[File]:
    """Every file of a zip or tar that is not hidden.  `prefix` begins the names.  Raises BadSource."""
    if ARCHIVES.search(file or uri)[1].lower() == "zip":
        return zip_files(uri, file, prefix)
    return tar_files(uri, file, mark, prefix)


def _is_hidden(name: str) -> bool:
    return any(map(hidden, name.split("/")))


def tar_files(uri: str, file: str, mark: str, prefix: str) -> Iterator[File]:
    """The files of a .tar, or of a .tar.gz, which is unpacked first.  One pass over the headers."""
    placed = located(uri, file)
    zipped = not placed.name.lower().endswith(".tar")
    opened = _Headers(unpacked(uri, file, mark)) if zipped else _Headers(open_at(uri, file))
    try:
        for member in _members(opened, placed.name):
            name = member.name
            check_inside(name, f"{placed.name} holds an entry")
            inside = posixpath.normpath(name)  # without "./" and "//"
            if member.isdir() or _is_hidden(inside):
                continue
            if member.issym() or member.islnk():
                raise BadSource(f"{placed.name} holds the link {name!r}: {_PACK}")
            if not member.isreg() or member.issparse():
                raise BadSource(f"{placed.name} holds {name!r}, which is no plain file: {_PACK}")
            start, size = member.offset_data, member.size
            span = place("gz", file, mark, start, size) if zipped else place("span", file, start, size)
            yield checked(prefix, inside, size, f"{mark}:{start}:{size}", span)
    finally:
        if not zipped:
            opened.close()


def _members(opened: "_Headers", name: str) -> Iterator[tarfile.TarInfo]:
    end = opened.seek(0, os.SEEK_END)
    opened.seek(0)
    cut_off = BadSource(f"{name} is cut off or damaged: copy it again")
    try:
        tar = tarfile.open(fileobj=opened, mode="r:", errors="surrogateescape")  # noqa: SIM115
        count = 0
        while member := tar.next():
            count += 1
            tar.members.clear()  # it would keep all
            if count > MAX_ENTRIES:
                raise BadSource(f"{name} holds more than {MAX_ENTRIES:,} entries: divide it into several")
            if member.size < 0 or member.offset_data + member.size > end:
                raise cut_off
            yield member
        # a tar ends with blocks of zeros; without them nobody knows what is missing
        opened.seek(tar.offset)
        if opened.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise cut_off
    except (tarfile.TarError, EOFError, RecursionError, ValueError, struct.error, OverflowError) as error:
        if isinstance(error, BadSource):
            raise
        raise BadSource(f"{name} cannot be read as a tar archive ({error}): copy it again") from error


class _Headers:
    """A file that refuses to read much at once: a header that asks for gigabytes of names is no header."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek, self.tell, self.close = file.seek, file.tell, file.close

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _MAX_HEADER:
            raise BadSource(f"the archive holds a header of {size:,} bytes: pack it again")
        return self._file.read(size)


def zip_files(uri: str, file: str, prefix: str) -> Iterator[File]:
    """The files of a zip archive, from the directory at its end."""
    placed = located(uri, file)
    unpacked_bytes, packed_bytes = 0, placed.size() or 0
    with open_at(uri, file) as opened:
        for entry in _directory(opened, placed.name):
            name = entry.filename
            check_inside(name, f"{placed.name} holds an entry")
            unpacked_bytes += entry.file_size
            if explodes(unpacked_bytes, packed_bytes):
                raise BadSource(
                    f"{placed.name} explodes: {packed_bytes:,} bytes claim to unpack to more than {unpacked_bytes:,}"
                )
            if stat.S_ISLNK(entry.external_attr >> 16):
                raise BadSource(f"{placed.name} holds the link {name!r}: {_PACK}")
            inside = posixpath.normpath(name)
            if name.endswith("/") or _is_hidden(inside):
                continue
            where = place(
                "zip",
                file,
                name,
                entry.header_offset,
                entry.compress_size,
                entry.file_size,
                entry.compress_type,
                entry.flag_bits & ENCRYPTED,
                entry.CRC,
            )
            yield checked(prefix, inside, entry.file_size, f"{entry.file_size}:{entry.CRC:08x}", where)


_ENTRY = struct.Struct("<4s4B4H3L5H2L")  # central directory
_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_END64_LOCATOR = struct.Struct("<4sLQL")
_UTF8 = 0x800


def _directory(opened: BinaryIO, name: str) -> Iterator[zipfile.ZipInfo]:
    """The entries of a zip's central directory, one at a time.  [APPNOTE 6.3.10, sections 4.3.12 to 4.3.16]"""
    damaged = BadSource(f"{name} cannot be read as a zip archive: it may be cut off or damaged; copy it again")
    count, size, start, before = _directory_end(opened, damaged)
    opened.seek(start + before)
    read = passed = 0
    while read < size:
        passed += 1
        if max(passed, count) > MAX_ENTRIES:  # the count may be a lie
            raise BadSource(f"{name} holds more than {MAX_ENTRIES:,} entries: divide it into several")
        head = opened.read(_ENTRY.size)
        if len(head) < _ENTRY.size or head[:4] != b"PK\1\2":
            raise damaged
        fields = _ENTRY.unpack(head)
        flags, method, crc, compressed, unpacked_size = fields[5], fields[6], *fields[9:12]
        name_size, extra_size, comment_size = fields[12:15]
        attributes, offset = fields[17:19]
        rest = opened.read(name_size + extra_size + comment_size)
        if len(rest) < name_size + extra_size + comment_size:
            raise damaged
        read += len(head) + len(rest)
        entry = zipfile.ZipInfo.__new__(zipfile.ZipInfo)  # its constructor would alter the name
        entry.filename = _entry_name(rest[:name_size], flags)
        entry.flag_bits, entry.compress_type, entry.CRC, entry.external_attr = flags, method, crc, attributes
        wide = _wide(rest[name_size : name_size + extra_size])
        values = [unpacked_size, compressed, offset]
        for i, value in enumerate(values):
            if value == 0xFFFFFFFF and wide:
                values[i] = wide.pop(0)
        entry.file_size, entry.compress_size, entry.header_offset = values[0], values[1], values[2] + before
        yield entry


def _entry_name(raw: bytes, flags: int) -> str:
    """UTF-8 where it is, declared or not (macOS does not); else the code page that the format began with."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw.decode(*(("utf-8", "surrogateescape") if flags & _UTF8 else ("cp437",)))


def _wide(extra: bytes) -> list[int]:
    """The 64-bit values of an entry's extra field, in place of those that are 0xFFFFFFFF."""
    while len(extra) >= 4:
        kind, size = struct.unpack_from("<2H", extra)
        if kind == 1:
            size = min(size, len(extra) - 4) // 8 * 8
            return [value for (value,) in struct.iter_unpack("<Q", extra[4 : 4 + size])]
        extra = extra[4 + size :]
    return []


def _directory_end(opened: BinaryIO, damaged: BadSource) -> tuple[int, int, int, int]:
    """(entries, bytes, offset) of the directory, and the bytes that stand before the archive in its file."""
    length = opened.seek(0, os.SEEK_END)
    tail_at = max(0, length - _END.size - 2**16)
    opened.seek(tail_at)
    tail = opened.read(length - tail_at)
    at = tail.rfind(b"PK\5\6")
    if at < 0 or len(tail) - at < _END.size:
        raise damaged
    _, _, _, _, count, size, start, _ = _END.unpack_from(tail, at)
    end = tail_at + at
    if at >= _END64_LOCATOR.size and tail[at - _END64_LOCATOR.size :].startswith(b"PK\6\7"):
        end -= _END64_LOCATOR.size + _END64.size
        opened.seek(max(0, end))
        fields = opened.read(_END64.size)
        if len(fields) < _END64.size or fields[:4] != b"PK\6\6":
            raise damaged
        count, size, start = _END64.unpack(fields)[7:]
    before = end - size - start
    if before < 0:
        raise damaged
    return count, size, start, before
