"""Files set aside: what could not be used and why, with the originals, so that people can look and decide.

They lie in `quarantine/<dataset>/` of the data root: `reasons.jsonl` has a line for each, sorted by name, and the originals
are in WebDataset tars, `quarantine-000000.tar` and so on, as `<number>.bin` with their line beside them as `<number>.json`.
Of duplicates no original is kept: their picture is in the shards.
"""

import json
import tarfile
from collections.abc import Callable, Iterable, Iterator
from hashlib import sha256
from itertools import count
from pathlib import Path

from diffusion.data import manifest
from diffusion.data.manifest import DUPLICATE, NOT_DAMAGE
from diffusion.data.pictures.bad_picture import POLICY, BadPicture
from diffusion.recipe import Frozen, canonical_json, first_mistake
from diffusion.store.storage import Storage, StorageRefused, open_storage

REASONS = "reasons.jsonl"
MAX_ORIGINALS_BYTES = 2**30  # originals are kept up to this sum, in order of name; all are listed
MAX_TAR_BYTES = 2**26  # of a tar, but for one original that is larger
_BLOCK = 2**20
_PLACE = "quarantine"


class SetAside(Frozen):
    """One file that is in no shard.  `kind` is a few words to count by, `detail` is for people.

    sha256, bytes: of the original; None where it could not be read.  tar, offset: where it is kept; None where it is not.
    """

    name: str
    kind: str
    detail: str
    sha256: str | None = None
    bytes: int | None = None
    tar: str | None = None
    offset: int | None = None

    @property
    def place(self) -> str | None:
        """Where `read_place` finds the original in the data root."""
        if self.tar is None:
            return None
        return canonical_json([_PLACE, self.tar, self.offset, self.bytes, self.sha256]).decode()


class TooManyRejected(ValueError):
    """A larger share of the files than the recipe allows could not be used."""


class DamagedQuarantine(ValueError):
    """What was set aside is not as it was written, or is gone."""


def place_of(digest: str) -> str:
    """Where the files that the dataset (or the failed stage) with this digest set aside lie in the data root."""
    return f"quarantine/{digest[:16]}"


def write(
    root: Storage, folder: str, files: Iterable[tuple[SetAside, str]], read: Callable[[str], bytes], scratch: Path
) -> None:
    """Write the quarantine `folder` of the root: each file set aside, with its place, by name; "": it is kept nowhere.

    read: place -> bytes, or BadPicture or DamagedQuarantine.  In memory is one original at a time; `scratch` holds one tar.
    """
    reasons, tar, kept, tars = scratch / REASONS, _Tar(scratch / "quarantine.tar"), 0, 0
    with open(reasons, "wb") as lines:
        for number, (file, place) in enumerate(files):
            data = None
            if file.kind != DUPLICATE and place:
                try:
                    data = read(place)
                except (BadPicture, DamagedQuarantine):  # it could not be read in the first place, or no more
                    data = None
                else:
                    file = file.model_copy(update={"sha256": sha256(data).hexdigest(), "bytes": len(data)})
            if data is not None and kept + len(data) > MAX_ORIGINALS_BYTES:
                data = None
            if data is not None and tar.size and tar.size + len(data) > MAX_TAR_BYTES:
                tar.put(root, _tar_name(folder, tars))
                tars += 1
            if data is not None:
                kept += len(data)
                file = file.model_copy(
                    update={"tar": _tar_name(folder, tars), "offset": tar.add(f"{number:06d}.bin", data)}
                )
            line = canonical_json(file)
            lines.write(line + b"\n")
            if file.kind != DUPLICATE:
                tar.add(f"{number:06d}.json", line)
    if tar.size:
        tar.put(root, _tar_name(folder, tars))
    root.put(f"{folder}/{REASONS}", reasons)
    reasons.unlink()


def _tar_name(folder: str, number: int) -> str:
    return f"{folder}/quarantine-{number:06d}.tar"


class _Tar:
    """A tar being written to a file, with equal headers for equal members.  It starts anew after `put`."""

    def __init__(self, path: Path) -> None:
        self.path, self.size = path, 0

    def add(self, name: str, data: bytes) -> int:
        """Append a member; returns the offset of its bytes."""
        info = tarfile.TarInfo(name)
        info.size, info.mode = len(data), 0o444
        with open(self.path, "ab" if self.size else "wb") as file:
            file.write(info.tobuf(tarfile.USTAR_FORMAT))
            offset = file.tell()
            file.write(data + bytes(-len(data) % tarfile.BLOCKSIZE))
            self.size = file.tell()
        return offset

    def put(self, root: Storage, name: str) -> None:
        """End the tar and put it in its place."""
        with open(self.path, "ab") as file:
            file.write(bytes(2 * tarfile.BLOCKSIZE))
        root.put(name, self.path)
        self.path.unlink()  # a folder may hold this very file: it is not written to again
        self.size = 0


def entries(root: Storage, digest: str) -> Iterator[SetAside]:
    """What the dataset with this digest set aside, by name.  Raises DamagedQuarantine, and ValueError where there is no
    such dataset."""
    name, offset, rest = f"{place_of(digest)}/{REASONS}", 0, b""
    try:
        while block := root.read(name, offset, _BLOCK):
            offset += len(block)
            *lines, rest = (rest + block).split(b"\n")
            yield from (SetAside.model_validate_json(line) for line in lines)
        if rest:
            raise ValueError("it is cut off")
    except StorageRefused:
        raise
    except ValueError as error:
        raise DamagedQuarantine(
            f"{root.uri}/{name}, which says what this dataset set aside, is damaged ({first_mistake(error)}): shard again"
            " with `diffusion shard --fresh`"
        ) from error
    except FileNotFoundError:
        if manifest.load(f"{root.uri}/{manifest.place_of(digest)}").set_aside:
            raise DamagedQuarantine(
                f"{root.uri}/{name} is missing: the files that this dataset set aside are not known any more; shard again"
                " with `diffusion shard --fresh`"
            ) from None


def original(root: Storage, file: SetAside) -> bytes:
    """The bytes of a file set aside.  Raises ValueError where they are not kept, DamagedQuarantine where they are others."""
    if file.place is None:
        why = (
            "it could not be read" if file.sha256 is None else f"kept are {MAX_ORIGINALS_BYTES:,} bytes, and no damage"
        )
        raise ValueError(f"{file.name} ({file.kind}) is listed, but not kept: {why}")
    return read_place(root.uri, file.place)


def is_place(place: str) -> bool:
    """Whether a file is in quarantine, and not in a source."""
    return place.startswith(f'["{_PLACE}",')


def read_place(uri: str, place: str) -> bytes:
    """The bytes of a file in the quarantine of the data root `uri`.  Raises DamagedQuarantine."""
    _, tar, offset, size, expected = json.loads(place)
    try:
        data = open_storage(uri).read(tar, offset, size)
    except FileNotFoundError as error:
        raise DamagedQuarantine(_lost(uri, tar, "is missing")) from error
    if sha256(data).hexdigest() != expected:
        raise DamagedQuarantine(_lost(uri, tar, f"has other bytes at {offset:,} than were set aside"))
    return data


def _lost(uri: str, tar: str, what: str) -> str:
    return (
        f"{uri}/{tar} {what}: an original there is lost. Its source may still have it: shard that again with `diffusion"
        " shard --fresh`"
    )


def within_budget(by_kind: dict[str, int], total: int, max_rejected: float) -> bool:
    """Whether at most `max_rejected` of `total` files are damaged; duplicates are not."""
    return sum(_bad(by_kind).values()) <= max_rejected * total


def too_many(
    by_kind: dict[str, int], total: int, max_rejected: float, examples: list[SetAside], where: str
) -> TooManyRejected:
    """The error for a budget that is exceeded: counts, reasons, examples, the quarantine's folder, what to type next."""
    bad = _bad(by_kind)
    rejected = sum(bad.values())
    kinds = ", ".join(f"{count} {kind}" for kind, count in bad.items())
    shown = "".join(f"\n  {file.name}: {file.kind} ({file.detail})" for file in examples)
    told = (
        f"{rejected} of {total} files cannot be used ({kinds}); shard.max_rejected allows {max_rejected:.1%}.{shown}\n"
    )
    told += f"All of them, with reasons: {where}. "
    if unwanted := POLICY & bad.keys():
        told += f"What is {' or '.join(sorted(unwanted))} is so by the recipe: shard.min_side, shard.max_aspect. "
    if rejected == total:
        return TooManyRejected(f"{told}Nothing would be left: repair the source, or give another")
    enough = next(share for p in count(2) if (share := -(-rejected * 10**p // total) / 10**p) < 1)
    return TooManyRejected(
        f"{told}Repair or remove them in the source; or go on without them: `diffusion shard --set"
        f" shard.max_rejected={enough}`"
    )


def _bad(by_kind: dict[str, int]) -> dict[str, int]:
    return {kind: count for kind, count in by_kind.items() if kind not in NOT_DAMAGE}
