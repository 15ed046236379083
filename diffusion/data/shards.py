"""Shards: plain WebDataset tars anyone can read, with an index of byte offsets beside each.

A sample is four members with one key: `.cls` (class index), `.json` (facts), `.png` or `.jpg`, `.txt` (first caption).
Time, owner and mode of every member are fixed, so equal samples give equal bytes, and a shard is named by the sha256 of
its bytes.  The index, a `.npy` of one row per sample, has what it takes to read any picture in one go and to know it
undamaged.
"""

import hashlib
import io
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from zlib_ng.zlib_ng import crc32

from diffusion.data.manifest import FILE, Encoding, ShardEntry, Split
from diffusion.data.pictures.buckets import Size
from diffusion.recipe import canonical_json
from diffusion.store.publish import PREFIX, sha256_file
from diffusion.store.storage import Storage

EXTENSION: dict[Encoding, str] = {"png": "png", "jpeg": "jpg"}
INDEX = np.dtype(
    [
        ("key", "S32"),
        ("label", "<i4"),
        ("captions", "<i4"),
        ("image_offset", "<i8"),  # bytes from the start of the tar
        ("image_size", "<i8"),
        ("image_crc32", "<u4"),
        ("json_offset", "<i8"),
        ("json_size", "<i8"),
        ("txt_offset", "<i8"),
        ("txt_size", "<i8"),
    ]
)
_BLOCK = 2**20  # bytes written at a time: the file system's cost of a write is a picture's
_AHEAD = 16  # samples, of up to `_BLOCK` bytes, that are taken before they are packed
_COLUMNS = repr(np.lib.format.dtype_to_descr(INDEX)).encode()  # as they stand in the header of a .npy


class PackedSample(NamedTuple):
    """What goes into a shard under one key of up to 32 ASCII characters.  No dots in it: WebDataset takes the rest for the
    extension.  facts["captions"] lists (text, weight)."""

    key: str
    label: int
    facts: dict
    image: bytes


def write_shard(
    folder: Path,
    split: Split,
    samples: Iterable[PackedSample],
    encoding: Encoding = "png",
    *,
    size: Size | None = None,
) -> ShardEntry:
    """Write a tar and its index into `folder`, as the file names of the entry it returns; the same samples in the same
    order give the same bytes.  size: of its pictures, where they are not the dataset's square.

    Raises ValueError for a key that is empty, too long, used twice or has a dot or a slash, and for no samples.
    """
    rows, keys, offset = [], set(), 0
    parts, written, digest = [], 0, hashlib.sha256()
    with tempfile.NamedTemporaryFile(dir=folder, prefix=PREFIX, suffix=".tar", delete=False) as file:
        try:
            for sample in _ahead(samples):
                key = sample.key
                if not 0 < len(key) <= 32 or not key.isascii() or "." in key or "/" in key:
                    raise ValueError(f"key {key!r}: a key has 1 to 32 ASCII characters and neither '.' nor '/'")
                keys.add(key)
                captions = sample.facts["captions"]
                members = {
                    "cls": b"%d" % sample.label,
                    "json": canonical_json(sample.facts),
                    EXTENSION[encoding]: sample.image,
                    "txt": captions[0][0].encode() if captions else b"",
                }
                spans = {}
                for name, data in members.items():
                    padding = bytes(-len(data) % tarfile.BLOCKSIZE)
                    parts += (_header(f"{key}.{name}", len(data)), data, padding)
                    spans[name] = (offset + tarfile.BLOCKSIZE, len(data))
                    offset += tarfile.BLOCKSIZE + len(data) + len(padding)
                image = (*spans[EXTENSION[encoding]], crc32(sample.image))
                rows.append((key, sample.label, len(captions), *image, *spans["json"], *spans["txt"]))
                if offset - written >= _BLOCK:
                    written += _write(file, digest, parts)
            if not rows or len(keys) != len(rows):
                raise ValueError(f"a shard of {len(rows)} samples with {len(keys)} different keys")
            parts.append(bytes(2 * tarfile.BLOCKSIZE + -(offset + 2 * tarfile.BLOCKSIZE) % tarfile.RECORDSIZE))
            _write(file, digest, parts)
            file.flush()
            index = io.BytesIO()
            np.save(index, np.array(rows, INDEX), allow_pickle=False)
            entry = ShardEntry(
                split=split,
                pictures=len(rows),
                bytes=file.tell(),
                sha256=digest.hexdigest(),
                index_sha256=hashlib.sha256(index.getvalue()).hexdigest(),
                size=size,
            )
            (folder / Path(entry.index).name).write_bytes(index.getvalue())
            Path(file.name).chmod(0o644)
            Path(file.name).rename(folder / Path(entry.tar).name)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise
    return entry


def _ahead(samples: Iterable[PackedSample]) -> Iterator[PackedSample]:
    """The samples, taken a few at a time: between two pictures that are encoded, packing finds the processor's caches
    cold."""
    waiting, size = [], 0
    for sample in samples:
        waiting.append(sample)
        size += len(sample.image)
        if len(waiting) == _AHEAD or size >= _BLOCK:
            yield from waiting
            waiting, size = [], 0
    yield from waiting


def _write(file: BinaryIO, digest: "hashlib._Hash", parts: list[bytes]) -> int:
    """Write and digest what waits in `parts`, and empty it.  Returns its bytes."""
    block = b"".join(parts)
    parts.clear()
    digest.update(block)
    return file.write(block)


def _template() -> tuple[bytes, int]:
    """The header of an empty member without name, and the sum of its bytes without size and checksum."""
    info = tarfile.TarInfo("")
    info.mtime, info.mode, info.uid, info.gid, info.uname, info.gname = 0, 0o444, 0, 0, "", ""
    header = info.tobuf(tarfile.USTAR_FORMAT)
    return header, sum(header[:124]) + sum(header[136:148]) + 8 * ord(" ") + sum(header[156:])


_HEADER, _HEADER_SUM = _template()
_OWNER, _TIME, _REST = _HEADER[100:124], b"\0" + _HEADER[136:148], b"\0 " + _HEADER[156:]


def _header(name: str, size: int) -> bytes:
    """A member's header as tarfile writes it, ten times as fast.  name: up to 99 ASCII characters; size: below 8 GiB."""
    encoded, digits = name.encode("ascii"), b"%011o" % size
    checksum = b"%06o" % (_HEADER_SUM + sum(encoded) + sum(digits))
    return b"".join((encoded.ljust(100, b"\0"), _OWNER, digits, _TIME, checksum, _REST))


def put_shard(storage: Storage, folder: Path, entry: ShardEntry) -> None:
    """Move a shard that `write_shard` wrote into `folder` to its place in the storage, the index last."""
    for name in (entry.tar, entry.index):
        path = folder / Path(name).name
        storage.put(name, path)
        path.unlink()


class DamagedShard(ValueError):
    """A file of a published dataset is missing or not as it was written.  The message names it and says what to do."""


def read_index(storage: Storage, entry: ShardEntry) -> np.ndarray:
    """The index of a shard, (entry.pictures,) of INDEX, read-only.  Raises DamagedShard."""
    try:
        data = storage.read(entry.index)
    except FileNotFoundError as error:
        raise DamagedShard(damaged(storage, entry.index, "is missing")) from error
    if hashlib.sha256(data).hexdigest() != entry.index_sha256:
        raise DamagedShard(damaged(storage, entry.index, "differs from the manifest's sha256"))
    if (index := parse_index(data, entry.pictures)) is None:
        raise DamagedShard(damaged(storage, entry.index, f"is no index of {entry.pictures} pictures"))
    return index


def parse_index(data: bytes, pictures: int) -> np.ndarray | None:
    """The bytes of an index -> (pictures,) of INDEX, read-only; None where they are no such index.

    numpy's own reader has Python parse the header, which is known: that takes 0.2 ms, and in several threads at once CPython
    3.11 now and then raises SystemError ("AST constructor recursion depth mismatch").
    """
    start = 10 + int.from_bytes(data[8:10], "little")
    if _COLUMNS not in data[:start] or len(data) != start + pictures * INDEX.itemsize:
        return None
    return np.frombuffer(data, INDEX, offset=start)


def check_shard(storage: Storage, entry: ShardEntry, path: Path) -> None:
    """Read all of the copy `path` of a shard and compare its sha256.  Raises DamagedShard."""
    if (actual := sha256_file(path)) != entry.sha256:
        raise DamagedShard(damaged(storage, entry.tar, f"has sha256 {actual[:12]}, as its name does not say"))


def damaged(storage: Storage, name: str, what: str) -> str:
    """The message for a file of a published dataset that is not as it was written."""
    return (
        f"{storage.uri}/{name} {what}. A published file never changes, so this one is damaged: remove it and the {FILE} of"
        " its dataset, and make them again with `diffusion shard`"
    )
