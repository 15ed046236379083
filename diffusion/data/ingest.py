"""From a source to a published dataset: list it, read and decode every file, decide what goes where, write the shards.

The work is two streams of independent tasks (decode a chunk of files, write a shard; `diffusion.data.pack`); `each` runs a
function over such a stream, in this process by default and on Ray in `diffusion.adapters.ray_data`.  All that is known of
the files is in a catalogue on disk (`diffusion.data.catalogue`), so memory does not grow with their number, and a stage that
was interrupted, however it ended, goes on when it is called again: decoded files and written shards are not made again.

A source that was sharded before with the same recipe gives a new version of its dataset: files that are as they were are not
read again, and full shards without a change are shared.  Nothing that is published changes.
"""

import hashlib
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from diffusion.data import catalogue, datasets, decide, facts, manifest, quarantine, versions
from diffusion.data.manifest import DUPLICATE, NOT_DAMAGE, Manifest, Processing, ShardEntry
from diffusion.data.pack import decode_chunk, pack_shard, read_original
from diffusion.data.pictures.bad_picture import POLICY, UNSAFE_NAME
from diffusion.data.pictures.buckets import Size, buckets_by
from diffusion.data.sources import Source, open_source, original_of
from diffusion.data.versions import Head
from diffusion.data.work import blobs, working
from diffusion.recipe import ShardRecipe, canonical_json, digest_of
from diffusion.store.refs import DatasetRef
from diffusion.store.storage import LocalFolder, Storage, open_storage

Each = Callable[[Callable[[dict], dict], Iterable[dict]], Iterable[dict]]  # results may come in any order
Progress = Callable[[int, int], None]  # files decoded, files in all
_CHUNK_FILES = 256
_CHUNK_BYTES = 2**26  # of pixels: what a worker holds of a chunk is less


def shard_dataset(
    source: str | Path,
    recipe: ShardRecipe,
    root: str | Path | Storage,
    work: Path | None = None,
    *,
    fresh: bool = False,
    progress: Progress | None = None,
    each: Each = map,
) -> DatasetRef:
    """Shard `source` into the data root, or find that it is there already.

    work: the folder of interrupted work; None: in a root that is a folder.  fresh: no version goes before this one, and
    every file is read.  Raises BadSource (nothing usable), quarantine.TooManyRejected, catalogue.Busy, ValueError (a damaged
    dataset), and what the source and the root raise.
    """
    opened = open_source(source, columns=recipe.columns)
    storage = open_storage(root) if isinstance(root, str | Path) else root
    if not fresh and (ready := versions.settled(storage, opened.uri, recipe, opened.fingerprint)):
        return _verified(storage, ready.digest)
    name = f"{versions.head_key(opened.uri, recipe)}{'-fresh' if fresh else ''}"
    with working(storage, work, name) as (folder, db):
        catalogue.list_items(db, _rows(opened))
        while True:
            last = versions.head(storage, opened.uri, recipe)
            parent = None if fresh or last is None else _dataset(storage, last.digest)
            released = parent.released if parent else ()
            catalogue.load_before(
                db, parent.digest if parent else "", versions.read_files(storage, parent, folder) if parent else ()
            )
            catalogue.adopt(db, released, POLICY)
            catalogue.forget_unread(db)
            job = _Job(db, recipe, storage, folder, parent, opened.uri, released, each)
            made = _make(job, progress)
            if (
                versions.head(storage, opened.uri, recipe) == last
            ):  # else people released files meanwhile: go on from there
                break
        versions.set_head(storage, recipe, Head(source=opened.uri, fingerprint=opened.fingerprint, digest=made.digest))
    return made


def _dataset(root: Storage, digest: str) -> Manifest:
    return manifest.load(f"{root.uri}/{manifest.place_of(digest)}", digest=digest)


def release(
    root: Storage, digest: str, sha256s: Iterable[str], work: Path | None = None, *, each: Each = map
) -> DatasetRef:
    """A new version of a dataset that holds the files with these sha256, which a policy of the recipe had held back.

    The files come from quarantine, not from the source.  Raises ValueError for a file that is damaged, unknown or not kept.
    """
    wanted, held = set(sha256s), {}
    for file in quarantine.entries(root, digest):
        if file.sha256 in wanted:
            held.setdefault(file.sha256, []).append(file)
    if unknown := sorted(wanted - held.keys()):
        raise ValueError(
            f"sha256 {unknown[0][:16]} is of no file that this dataset set aside: see `diffusion data quarantine list`"
        )
    for file in (file for files in held.values() for file in files):
        if file.kind == DUPLICATE:
            raise ValueError(f"{file.name} is not needed: it is {file.detail}, which the dataset holds")
        if file.kind == UNSAFE_NAME and any(same.kind in POLICY for same in held[file.sha256]):
            continue  # a copy under a name that cannot be written down stays where it is
        if file.kind == UNSAFE_NAME:
            raise ValueError(
                f"{file.name} is set aside because {file.detail}: rename it in the source, and shard again"
            )
        if file.kind not in POLICY:
            raise ValueError(
                f"{file.name} is set aside because it is {file.kind} ({file.detail}): what is damaged cannot be released."
                " Repair it in the source, or decode it again with `diffusion data quarantine retry`"
            )
        quarantine.original(root, file)
    return _again(root, digest, "release", work, wanted, (), each)


def retry(root: Storage, digest: str, work: Path | None = None, *, each: Each = map) -> DatasetRef:
    """Decode everything in a dataset's quarantine again: a new version with what passes now, or the same dataset."""
    names = [file.name for file in quarantine.entries(root, digest) if file.place and file.kind != UNSAFE_NAME]
    return _again(root, digest, "retry", work, (), names, each)


def _again(
    root: Storage, digest: str, why: str, work: Path | None, released: Iterable[str], names: Iterable[str], each: Each
) -> DatasetRef:
    """A version made of the parent's own files: the released ones and those in `names` are decoded again."""
    parent = manifest.load(f"{root.uri}/{manifest.place_of(digest)}")
    recipe = versions.recipe_of(root, parent)
    with working(root, work, f"{parent.digest[:16]}-{why}") as (folder, db):
        catalogue.load_before(db, parent.digest, versions.read_files(root, parent, folder))
        places = ((file.name, file.place) for file in quarantine.entries(root, digest) if file.place)
        catalogue.list_before(db, places)
        job = _Job(db, recipe, root, folder, parent, root.uri, tuple(sorted({*parent.released, *released})), each)
        catalogue.adopt(db, job.released, POLICY)
        catalogue.forget(db, names)
        made = _make(job, None)
        versions.move_heads(root, parent.digest, made.digest)
    return made


@dataclass(frozen=True)
class _Job:
    """What one call works with."""

    db: sqlite3.Connection
    recipe: ShardRecipe
    root: Storage
    folder: Path
    parent: Manifest | None
    source: str  # URI that places are relative to
    released: tuple[str, ...]
    each: Each


def _rows(source: Source) -> Iterator[tuple]:
    for item in source.items():
        captions = canonical_json([[caption.text, caption.weight] for caption in item.captions])
        yield item.name, item.mark, item.place, item.label, captions.decode(), canonical_json(item.extra).decode()


def _make(job: _Job, progress: Progress | None) -> DatasetRef:
    """Bring the catalogue to its end and publish what it says."""
    db, recipe = job.db, job.recipe
    while True:
        _decode(job, progress)
        by_kind = decide.choose(db, recipe.near_duplicates, job.released)
        _check_budget(job, by_kind)
        classes = decide.arrange(db, recipe, job.parent)
        if not (names := decide.without_pixels(db)):
            break
        catalogue.forget(db, names)
    entries = _write_shards(job)
    made = Manifest(
        resolution=recipe.resolution,
        classes=classes,
        train_counts=decide.counts(db, "train", len(classes)),
        holdout_counts=decide.counts(db, "holdout", len(classes)),
        shards=tuple(entry for _, entry in entries),
        processing=Processing(background=recipe.background, encoding=recipe.encoding, buckets=buckets_by(recipe)),
        recipe_digest=digest_of(recipe),
        files=catalogue.progress(db)[1],
        set_aside=by_kind,
        parent=job.parent and job.parent.digest,
        released=job.released,
    )
    if job.parent and made == job.parent.model_copy(update={"parent": job.parent.digest}):
        return _verified(job.root, job.parent.digest)  # touched, but nothing changed
    if job.root.size(f"{manifest.place_of(made.digest)}/{manifest.FILE}") is None:
        _publish(job, made, [place for place, _ in entries])
    return _verified(job.root, made.digest)


def _verified(root: Storage, digest: str) -> DatasetRef:
    uri = f"{root.uri}/{manifest.place_of(digest)}"
    return manifest.verify(uri, digest=digest).ref(uri)


def _decode(job: _Job, progress: Progress | None) -> None:
    """Find out about every file of which nothing is known."""
    recipe = job.recipe
    size = min(_CHUNK_FILES, max(1, _CHUNK_BYTES // (3 * recipe.resolution**2)))
    common = {"source": job.source, "recipe": recipe.model_dump(mode="json"), "released": list(job.released)}
    common |= {"blobs": blobs(job.root, job.folder, job.db).uri}
    done, total = catalogue.progress(job.db)

    def tasks() -> Iterator[dict]:
        for files in catalogue.unknown(job.db, size):
            files = [list(file) for file in files]
            # the name is of what goes in: a task done again writes the same object
            yield {**common, "files": files, "blob": digest_of([job.released, files])[:32]}

    for result in job.each(decode_chunk, tasks()):
        catalogue.record(job.db, result["rows"])
        done += len(result["rows"])
        if progress:
            progress(done, total)


def _write_shards(job: _Job) -> list[tuple[tuple[str, int], ShardEntry]]:
    """The dataset's shards in reading order: of each split, and of each size, those that stay, then the new ones, which are
    written.

    Each with (split, number) as `decide` numbers them; for one that stays ("shared", number in the parent's manifest).
    """
    db, root = job.db, job.root
    place = {_own_size(job.recipe, bucket): bucket for bucket in range(len(buckets_by(job.recipe)))}
    shared = decide.shared_shards(db)
    if job.parent:
        versions.check_shared(root, [job.parent.shards[n] for n in shared], job.parent.digest)
    new, waiting = list(decide.new_shards(db)), {}
    entries: dict[tuple[str, int], ShardEntry] = {}

    def take(shard: decide.NewShard, result: dict) -> None:
        entries[shard.split, shard.number] = ShardEntry(**result["entry"])
        decide.place_images(db, shard, result["images"])

    def tasks() -> Iterator[dict]:
        scratch = str(job.folder) if isinstance(root, LocalFolder) else None
        common = {"root": root.uri, "scratch": scratch, "encoding": job.recipe.encoding}
        for shard in new:
            done = catalogue.packed(db, shard.digest)
            if done and root.size(ShardEntry(**done["entry"]).tar) == done["entry"]["bytes"]:
                take(shard, done)
                continue
            waiting[shard.digest] = shard
            facts = {"digest": shard.digest, "split": shard.split, "size": _own_size(job.recipe, shard.bucket)}
            yield {**common, **facts, "samples": decide.samples_of(db, shard)}

    for result in job.each(pack_shard, tasks()):
        catalogue.record_packed(db, result["digest"], result)
        take(waiting.pop(result["digest"]), result)
    ordered = []
    for split in decide.SPLITS:
        stay = [n for n in shared if job.parent.shards[n].split == split]
        found = [(("shared", n), job.parent.shards[n]) for n in stay]
        found += [((split, shard.number), entries[split, shard.number]) for shard in new if shard.split == split]
        ordered += sorted(found, key=lambda pair: place.get(pair[1].size, 0))
    return ordered


def _own_size(recipe: ShardRecipe, bucket: int) -> Size | None:
    """The size of a bucket as a shard's entry says it: None for the square."""
    buckets, square = buckets_by(recipe), (recipe.resolution, recipe.resolution)
    return buckets[bucket] if buckets and buckets[bucket] != square else None


def _write_quarantine(job: _Job, folder: str) -> None:
    files = catalogue.set_aside(job.db)
    quarantine.write(job.root, folder, files, lambda place: read_original(job.source, original_of(place)), job.folder)


def _check_budget(job: _Job, by_kind: dict[str, int]) -> None:
    """Raises TooManyRejected; what was set aside then lies in the root to look at."""
    total, allowed = catalogue.progress(job.db)[1], job.recipe.max_rejected
    if quarantine.within_budget(by_kind, total, allowed):
        return
    digest = hashlib.sha256()
    for file, _ in catalogue.set_aside(job.db):
        digest.update(canonical_json(file))
    folder = quarantine.place_of(digest.hexdigest())
    if job.root.size(f"{folder}/{quarantine.REASONS}") is None:
        _write_quarantine(job, folder)
    bad = (file for file, _ in catalogue.set_aside(job.db) if file.kind not in NOT_DAMAGE)
    raise quarantine.too_many(by_kind, total, allowed, list(islice(bad, 5)), f"{job.root.uri}/{folder}")


def _publish(job: _Job, made: Manifest, places: list[tuple[str, int]]) -> None:
    """Put everything of the dataset in its place, the manifest last."""
    folder = manifest.place_of(made.digest)
    if made.set_aside:
        _write_quarantine(job, quarantine.place_of(made.digest))
    files = job.folder / versions.FILES
    versions.write_files(job.db, files, {place: number for number, place in enumerate(places)})
    job.root.put(f"{folder}/{versions.FILES}", files)
    files.unlink()
    job.root.put(f"{folder}/{versions.RECIPE}", canonical_json(job.recipe))
    job.root.put(f"{folder}/{datasets.REPORT}", canonical_json(facts.report(job.db, made)))
    manifest.publish(made, job.root)
