"""What sharding a source would do, without doing it: what is there, what is new, and what some of it looks like decoded."""

import heapq
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np

from diffusion.data import manifest, versions
from diffusion.data.pack import prepare, read_original
from diffusion.data.pictures.bad_picture import UNREADABLE, BadPicture
from diffusion.data.pictures.buckets import Size, size_for
from diffusion.data.pictures.decode import decode_into
from diffusion.data.sources import Item, describe, open_source
from diffusion.recipe import ShardRecipe
from diffusion.store.publish import temporary
from diffusion.store.storage import Storage

SAMPLE = 256  # files that are decoded
_TAR_BYTES = 8 * 512  # of a sample besides its picture: four headers, a label, facts, a caption
_THREADS = 4


class Changes(NamedTuple):
    """A source against the dataset it gave last."""

    since: str  # digest of that dataset
    new: int
    changed: int  # in their file, label, captions or metadata
    vanished: int
    same: int


class Sampled(NamedTuple):
    """Some files decoded.  The sums are over those that are kept."""

    files: int
    rejected: dict[str, int]  # kind of reason -> files
    examples: dict[str, list[tuple[str, str]]]  # kind -> (name, detail) of the first few
    seconds: float  # of one processor
    reading: float  # likewise, to decode them again from a shard
    bytes: int  # in shards
    sizes: dict[Size, int]  # (height, width) in shards -> pictures


class DryRun(NamedTuple):
    """What `diffusion shard --dry-run` says.  to_decode: files that would be read; sampled: some of them."""

    source: dict  # as `sources.describe`
    changes: Changes | None
    to_decode: int
    sampled: Sampled

    def of_all(self, number: float) -> int:
        """A sum over the sample, for all files that would be read."""
        return round(number * self.to_decode / self.sampled.files)


def dry_run(
    source: str | Path,
    recipe: ShardRecipe,
    root: Storage,
    *,
    fresh: bool = False,
    sample: int = SAMPLE,
    progress: Callable[[int, int], None] | None = None,
) -> DryRun:
    """Look at a source as `ingest.shard_dataset` would with the same arguments.  Writes nothing.

    The sample is of the files with the lowest sha256 of their name, so it is the same every time.  Raises BadSource.
    """
    opened = open_source(source, columns=recipe.columns)
    last = None if fresh else versions.head(root, opened.uri, recipe)
    counts: Counter[str] = Counter()

    def to_decode() -> Iterator[Item]:
        for item, what in _compared(opened.items(), _rows_of(root, last.digest) if last else iter(())):
            counts[what] += 1
            if item is not None and what in ("new", "changed file", "unread"):
                yield item

    chosen = heapq.nsmallest(sample, to_decode(), key=lambda item: sha256(item.name.encode()).digest())
    changed = counts["changed file"] + counts["changed facts"]
    same = counts["same"] + counts["unread"]
    changes = last and Changes(last.digest, counts["new"], changed, counts["vanished"], same)
    return DryRun(
        source=describe(opened),
        changes=changes,
        to_decode=counts["new"] + counts["changed file"] + counts["unread"],
        sampled=_decoded(opened.uri, chosen, recipe, progress),
    )


def _rows_of(root: Storage, digest: str) -> Iterator[dict]:
    """What became of each file in the dataset before, by name."""
    before = manifest.load(f"{root.uri}/{manifest.place_of(digest)}", digest=digest)
    with temporary("the list of a dataset's files") as scratch:
        yield from versions.read_files(root, before, scratch)


def _compared(items: Iterator[Item], rows: Iterator[dict]) -> Iterator[tuple[Item | None, str]]:
    """Both by name -> (the item, if it is there; what it is against the row of its name)."""
    row = next(rows, None)
    for item in items:
        while row is not None and row["name"] < item.name:
            yield None, "vanished"
            row = next(rows, None)
        if row is None or row["name"] != item.name:
            yield item, "new"
            continue
        yield item, _against(item, row)
        row = next(rows, None)
    while row is not None:
        yield None, "vanished"
        row = next(rows, None)


def _against(item: Item, row: dict) -> str:
    if item.mark != row["mark"]:
        return "changed file"
    if row.get("kind") == UNREADABLE and "file" not in row:
        return "unread"  # is tried again
    captions = [[caption.text, caption.weight] for caption in item.captions]
    before = row["label"], json.loads(row["captions"]), json.loads(row["extra"])
    return "same" if (item.label, captions, item.extra) == before else "changed facts"


def _decoded(uri: str, items: list[Item], recipe: ShardRecipe, progress: Callable[[int, int], None] | None) -> Sampled:
    rejected: Counter[str] = Counter()
    examples: dict[str, list[tuple[str, str]]] = {}
    seconds, reading, size = 0.0, 0.0, 0
    sizes: Counter[Size] = Counter()
    with ThreadPoolExecutor(_THREADS) as pool:
        for done, (item, result) in enumerate(
            zip(items, pool.map(lambda item: _one(uri, item, recipe), items), strict=True), 1
        ):
            if progress:
                progress(done, len(items))
            if isinstance(result, BadPicture):
                rejected[result.kind] += 1
                examples.setdefault(result.kind, []).append((item.name, result.detail))
                continue
            seconds += result.seconds
            reading += result.reading
            size += result.bytes
            sizes[result.size] += 1
    few = {kind: sorted(named)[:3] for kind, named in sorted(examples.items())}
    return Sampled(
        files=len(items),
        rejected=dict(sorted(rejected.items())),
        examples=few,
        seconds=seconds,
        reading=reading,
        bytes=size,
        sizes=dict(sorted(sizes.items(), reverse=True)),
    )


class _Taken(NamedTuple):
    """What one file took, and what it gives."""

    seconds: float
    reading: float
    bytes: int
    size: Size


def _one(uri: str, item: Item, recipe: ShardRecipe) -> _Taken | BadPicture:
    """What decoding takes and gives; or why the file would be set aside."""
    try:
        data = read_original(uri, item.place)
        started = time.thread_time()
        facts, encoded = prepare(data, recipe, released=False)
    except BadPicture as error:
        return error
    made = time.thread_time()
    size = size_for(facts["width"], facts["height"], recipe)
    decode_into(encoded, np.empty((*size, 3), np.uint8))
    again = time.thread_time()
    return _Taken(made - started, again - made, _TAR_BYTES + -(-len(encoded) // 512) * 512, size)
