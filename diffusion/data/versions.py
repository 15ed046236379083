"""Versions of a dataset: which one a source goes on from, and what became of each file in it.

Beside the manifest, and no part of the identity, lie `files.jsonl.gz` (a line for each file of the source, kept or set
aside) and `recipe.json`.  `heads/<source and recipe>.json` in the data root names the newest dataset made of a source.
"""

import gzip
import json
import sqlite3
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from itertools import accumulate
from pathlib import Path

from pydantic import ValidationError

from diffusion.data import manifest
from diffusion.data.datasets import local_copy
from diffusion.data.manifest import Manifest, ShardEntry
from diffusion.data.pictures.bad_picture import UNREADABLE
from diffusion.data.shards import DamagedShard, check_shard, damaged, read_index
from diffusion.recipe import Frozen, ShardRecipe, canonical_json, digest_of, first_mistake
from diffusion.store.refs import DatasetRef
from diffusion.store.storage import Storage

FILES = "files.jsonl.gz"
RECIPE = "recipe.json"
_READ_SHARE, _READ_BYTES = 1 / 30, 2**30  # of the shards that a version shares


class Head(Frozen):
    """The newest dataset of a source and a recipe, and the state of the source that it was made of."""

    source: str
    fingerprint: str
    digest: str


def head_key(source: str, recipe: ShardRecipe) -> str:
    """16 hex digits.  How many files may be rejected changes no picture, so it begins no other line of versions."""
    same = recipe.model_dump(mode="json", exclude={"max_rejected"})
    return digest_of({"source": source, "recipe": same})[:16]


def head(root: Storage, source: str, recipe: ShardRecipe) -> Head | None:
    """The newest dataset that the source at this URI gave, where it is still there."""
    found = _read_head(root, _head_name(head_key(source, recipe)))
    if found is None:
        return None
    return found if root.size(f"{manifest.place_of(found.digest)}/{manifest.FILE}") is not None else None


def newest(root: Storage, source: str, recipe: ShardRecipe, fingerprint: str) -> DatasetRef | None:
    """The newest dataset of the source at this URI, where it was made of the state that `fingerprint` names by this very
    recipe."""
    made = _newest(root, source, recipe, fingerprint)
    return made and made.ref(f"{root.uri}/{manifest.place_of(made.digest)}")


def settled(root: Storage, source: str, recipe: ShardRecipe, fingerprint: str) -> DatasetRef | None:
    """Likewise, where every file could be read: one that could not may be readable by now, though it looks the same to the
    listing."""
    made = _newest(root, source, recipe, fingerprint)
    whole = made is not None and UNREADABLE not in made.set_aside
    return made.ref(f"{root.uri}/{manifest.place_of(made.digest)}") if whole else None


def _newest(root: Storage, source: str, recipe: ShardRecipe, fingerprint: str) -> Manifest | None:
    last = head(root, source, recipe)
    if last is None or last.fingerprint != fingerprint:
        return None
    made = manifest.load(f"{root.uri}/{manifest.place_of(last.digest)}", digest=last.digest)
    return made if made.recipe_digest == digest_of(recipe) else None


def set_head(root: Storage, recipe: ShardRecipe, new: Head) -> None:
    """From now on the source goes on from this dataset."""
    root.put(_head_name(head_key(new.source, recipe)), canonical_json(new))


def move_heads(root: Storage, old: str, new: str) -> None:
    """Sources whose newest dataset is `old` go on from `new`, which holds the same state of them."""
    for found in list(root.walk("heads/")):
        current = _read_head(root, found.name)
        if current and current.digest == old:
            root.put(found.name, canonical_json(current.model_copy(update={"digest": new})))


def _read_head(root: Storage, name: str) -> Head | None:
    try:
        return Head.model_validate_json(root.read(name))
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise ValueError(
            f"{root.uri}/{name}, which says what a source's next version goes on from, is damaged ({first_mistake(error)}):"
            " remove it, and the next version begins anew"
        ) from error


def _head_name(key: str) -> str:
    return f"heads/{key}.json"


def recipe_of(root: Storage, dataset: Manifest) -> ShardRecipe:
    """The recipe that a dataset was made with.  Raises ValueError where it is not beside the manifest."""
    name = f"{manifest.place_of(dataset.digest)}/{RECIPE}"
    try:
        recipe = ShardRecipe.model_validate_json(root.read(name))
        if digest_of(recipe) != dataset.recipe_digest:
            raise ValueError("another recipe")
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"{root.uri}/{name} is missing or damaged: shard the source again, with --fresh") from error
    return recipe


def check_shared(root: Storage, shards: Sequence[ShardEntry], parent: str) -> None:
    """The shards that a version takes over from its parent: every index is read and compared with its sha256, every tar has
    its length, and the tars of `drawn` are read.  Raises DamagedShard."""
    chosen = set(drawn(shards, parent))

    def check(entry: ShardEntry) -> None:
        read_index(root, entry)
        if (size := root.size(entry.tar)) != entry.bytes:
            found = "is missing" if size is None else f"has {size:,} bytes instead of {entry.bytes:,}"
            raise DamagedShard(damaged(root, entry.tar, found))
        if entry in chosen:
            with local_copy(root, entry.tar) as path:
                check_shard(root, entry, path)

    with ThreadPoolExecutor(manifest.ASKED_AT_A_TIME) as pool:
        deque(pool.map(check, shards), maxlen=0)


def drawn(shards: Sequence[ShardEntry], parent: str) -> list[ShardEntry]:
    """Which shards shared with the parent of this digest are read: a `_READ_SHARE` of their bytes up to `_READ_BYTES`, one
    at the least, others for each parent."""
    most = min(_READ_SHARE * sum(entry.bytes for entry in shards), _READ_BYTES)
    turn = sorted(shards, key=lambda entry: sha256(f"{parent} {entry.sha256}".encode()).digest())
    before = accumulate((entry.bytes for entry in turn), initial=0)
    return [entry for entry, size in zip(turn, before, strict=False) if size < most]


def write_files(db: sqlite3.Connection, path: Path, shards: dict[tuple[str, int], int]) -> None:
    """What became of each file of the catalogue, as a .gz of JSON lines by name; equal files give equal bytes.

    shards: (split, number) of a new shard, or ("shared", number in the parent's manifest) -> its number in the manifest.
    """
    rows = db.execute(
        "SELECT i.name, i.mark, i.label, i.captions, i.extra, a.kind, a.detail, f.file, f.bytes, f.content, f.pixels,"
        " f.width, f.height, f.hash, s.split, s.digest, s.shared, s.number, s.image"
        " FROM items i JOIN found f USING (name) LEFT JOIN aside a USING (name) LEFT JOIN sample s USING (name)"
        " ORDER BY i.name"
    )
    columns = [column[0] for column in rows.description]
    with open(path, "wb") as raw, gzip.GzipFile("", "wb", compresslevel=6, fileobj=raw, mtime=0) as file:
        for values in rows:
            row = dict(zip(columns, values, strict=True))
            split, old, number, image = (row.pop(name) for name in ("split", "shared", "number", "image"))
            row |= {
                "captions": json.loads(row["captions"]),
                "extra": json.loads(row["extra"]),
                "sample": row.pop("digest"),
            }
            if split:
                shard = shards[(split, number) if old is None else ("shared", old)]
                row |= {"split": split, "shard": shard, "image": json.loads(image)[-3:]}
            row = {key: value for key, value in row.items() if value is not None}
            file.write(canonical_json(row) + b"\n")


def read_files(root: Storage, dataset: Manifest, scratch: Path) -> Iterator[dict]:
    """The rows of `write_files`, by name, with images placed as tasks read them.  Raises ValueError (missing, damaged)."""
    name = f"{manifest.place_of(dataset.digest)}/{FILES}"
    try:
        root.fetch(name, scratch / FILES)
    except FileNotFoundError as error:
        raise ValueError(_unknown(root, name, "is missing")) from error
    rows = 0
    try:
        with gzip.open(scratch / FILES, "rb") as lines:
            for rows, line in enumerate(lines, 1):  # noqa: B007
                row = json.loads(line)
                row |= {"captions": json.dumps(row["captions"]), "extra": json.dumps(row["extra"])}
                if "split" in row:
                    tar = dataset.shards[row["shard"]].tar
                    row["image"] = json.dumps([root.uri, tar, *row["image"]])
                yield row
    except (OSError, EOFError, zlib.error, ValueError, LookupError) as error:
        raise ValueError(_unknown(root, name, f"is damaged ({error})")) from error
    finally:
        (scratch / FILES).unlink()
    if rows != dataset.files:
        raise ValueError(_unknown(root, name, f"lists {rows} files instead of {dataset.files}"))


def _unknown(root: Storage, name: str, what: str) -> str:
    return (
        f"{root.uri}/{name} {what}: no version can go on from this dataset. Begin anew with `diffusion shard --fresh`"
    )
