"""From a bundle back to the pictures behind it: bundle -> run -> dataset -> manifest -> shards -> keys, each by its digest.

A link that is there is verified: its digest is computed, and it names the next one.  A link that is not says what is
missing and where it could be had; those behind it are still looked for, since the bundle names run and dataset itself, and
so does the receipt, whose word that is where the bundle is damaged or gone.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from diffusion.data import manifest
from diffusion.data.manifest import Manifest, ShardEntry
from diffusion.data.reading_order import order_of
from diffusion.data.shards import DamagedShard, damaged, read_index
from diffusion.data.versions import Head
from diffusion.recipe import TrainRecipe, digest_of
from diffusion.serving.receipt import AnyReceipt
from diffusion.store.averages import MANIFEST_NAME, STATE_NAME
from diffusion.store.bundle_spec import BundleSpec, bundle_path, read_facts
from diffusion.store.storage import Storage, open_storage
from diffusion.training.checkpoint import Facts

_CHUNK = 2**20  # positions of a run that are looked up at a time
_FEW = 2**12  # of which the first ones are looked for
_GENERATIONS = 20  # of parents of a dataset, and of models that a model was started from


@dataclass(frozen=True)
class Run:
    """The checkpoint that a bundle's weights are of, found."""

    uri: str  # of the checkpoint's folder
    facts: Facts


@dataclass(frozen=True)
class Data:
    """The dataset that a run was trained on, found."""

    uri: str
    manifest: Manifest
    source: str | None  # URI of what it was made of, where the data root still says
    parents: tuple[str, ...]  # digests of the datasets it goes on from, the nearest first

    @property
    def root(self) -> Storage:
        return manifest.root_of(self.uri)


class Missing(ValueError):
    """A link that is not there, or not what its digest says.  Says where it could be had."""


def find_run(store: Path, named: BundleSpec | AnyReceipt, copies: str | None = None) -> Run:
    """The run that a bundle says it is of, or where there is none a receipt, by the digest of its checkpoint.  copies: where
    the site has checkpoints copied to.

    Raises Missing: nowhere, damaged, or of another recipe or dataset than is said.
    """
    places = [open_storage(Path(store) / "runs")] + ([open_storage(f"{copies}/runs")] if copies else [])
    for place in places:
        for found in place.walk():
            if not found.name.endswith(f"/{MANIFEST_NAME}"):
                continue
            data = place.read(found.name)
            if hashlib.sha256(data).hexdigest() == named.run_digest:
                return _run_at(place, found.name.removesuffix(f"/{MANIFEST_NAME}"), json.loads(data), named)
    looked = " or ".join(place.uri for place in places)
    raise Missing(
        f"the checkpoint {named.run_digest[:16]} is not in {looked}: it lies in the home that trained it, or where that has"
        f" DIFFUSION_RUNS"
    )


def _run_at(place: Storage, name: str, said: dict, named: BundleSpec | AnyReceipt) -> Run:
    try:
        state = place.read(f"{name}/{STATE_NAME}")
    except FileNotFoundError as error:
        raise Missing(f"{place.uri}/{name}/{STATE_NAME} is gone: `diffusion verify` looks for what else is") from error
    if hashlib.sha256(state).hexdigest() != said["files"][STATE_NAME]["sha256"]:
        raise Missing(f"{place.uri}/{name}/{STATE_NAME} differs from its manifest: it was changed after the training")
    facts = Facts.model_validate_json(state)
    who, recipe = ("bundle", named.recipe_digest) if isinstance(named, BundleSpec) else ("receipt", None)
    if facts.dataset_digest != named.dataset_digest or recipe not in (None, digest_of(facts.recipe)):
        raise Missing(f"{place.uri}/{name} is of another recipe or dataset than the {who} says")
    return Run(f"{place.uri}/{name}", facts)


def find_data(root: Storage, digest: str) -> Data:
    """The dataset of this digest.  Raises Missing."""
    uri = f"{root.uri}/{manifest.place_of(digest)}"
    try:
        made = manifest.load(uri, digest=digest)
    except ValueError as error:
        there = root.size(f"{manifest.place_of(digest)}/{manifest.FILE}") is not None
        elsewhere = "it lies in the home that sharded it, or where that has DIFFUSION_DATA"
        raise Missing(
            str(error) if there else f"the dataset {digest[:16]} is not in {root.uri}: {elsewhere}"
        ) from error
    return Data(uri, made, _source_of(root, digest), tuple(_parents(root, made)))


def _parents(root: Storage, made: Manifest) -> Iterator[str]:
    for _ in range(_GENERATIONS):
        if made.parent is None:
            return
        yield made.parent
        try:
            made = manifest.load(f"{root.uri}/{manifest.place_of(made.parent)}", digest=made.parent)
        except ValueError:  # versions of before may be deleted
            return


def _source_of(root: Storage, digest: str) -> str | None:
    """The source whose newest dataset this is, or goes on from this."""
    for found in root.walk("heads/"):
        try:
            head = Head.model_validate_json(root.read(found.name))
            newest = manifest.load(f"{root.uri}/{manifest.place_of(head.digest)}", digest=head.digest)
        except (ValueError, FileNotFoundError):
            continue
        if digest in (head.digest, *_parents(root, newest)):
            return head.source
    return None


def missing_shards(data: Data) -> list[str]:
    """What is wrong with the shards of a dataset, by their size alone: names of the files that are not there in full."""
    found = {f.name: f.size for f in data.root.walk("shards/")}
    return [
        name
        for entry in data.manifest.shards
        for name, size in ((entry.tar, entry.bytes), (entry.index, None))
        if name not in found or size not in (None, found[name])
    ]


@dataclass(frozen=True)
class Seen:
    """What of a dataset's training pictures a run has seen."""

    pictures: int  # different ones
    shards: frozenset[int]  # numbers, among the training shards, of those that have one of them
    times: tuple[int, int] | None  # how often each, at least and at most; None: some more often, by weights or sizes


def seen_by(data: Data, recipe: TrainRecipe, images_seen: int) -> Seen:
    """Which training pictures were in the first `images_seen` positions of a run: arithmetic, nothing is read."""
    made = data.manifest
    entries, times = made.entries("train"), None
    if not made.parts and len(made.by_size("train")) < 2:  # one order, in which each comes once an epoch
        times = images_seen // made.images, -(-images_seen // made.images)
        if times[0]:
            return Seen(made.images, frozenset(range(len(entries))), times)
    order, seen = order_of(made, "train", recipe), np.zeros(made.images, bool)
    for start in range(0, images_seen, _CHUNK):
        seen[order.at(start, min(_CHUNK, images_seen - start))] = True
        if seen.all():
            break
    shards = np.searchsorted(_ends(entries), np.flatnonzero(seen), side="right")
    return Seen(int(seen.sum()), frozenset(shards.tolist()), times)


def first_seen(data: Data, recipe: TrainRecipe, images_seen: int, count: int) -> tuple[int, ...]:
    """Numbers of so many of the training shards that a run has seen a picture of, those first seen first."""
    order, ends = order_of(data.manifest, "train", recipe), _ends(data.manifest.entries("train"))
    found: dict[int, None] = {}  # in order
    for start in range(0, images_seen, _FEW):
        pictures = order.at(start, min(_FEW, images_seen - start))
        found |= dict.fromkeys(np.searchsorted(ends, pictures, side="right").tolist())
        if len(found) >= min(count, len(ends)):
            break
    return tuple(found)[:count]


def _ends(entries: tuple[ShardEntry, ...]) -> np.ndarray:
    """The number of the picture after the last one of each shard."""
    return np.cumsum([entry.pictures for entry in entries])


@dataclass(frozen=True)
class Key:
    """A training picture: its key, where it lies, and the name it had in the source."""

    key: str
    tar: str  # in the data root
    label: str
    source: str


def keys_in(data: Data, number: int) -> list[str]:
    """The keys in training shard `number`, in its order.  Raises DamagedShard."""
    return [key.decode() for key in read_index(data.root, data.manifest.entries("train")[number])["key"].tolist()]


def key_of(data: Data, picture: int) -> Key:
    """What is known of training picture `picture` of the dataset.  Raises DamagedShard."""
    entries = data.manifest.entries("train")
    ends = _ends(entries)
    number = int(np.searchsorted(ends, picture, side="right"))
    row = read_index(data.root, entries[number])[picture - int(ends[number])]  # counted from the shard's end
    try:
        facts = json.loads(data.root.read(entries[number].tar, int(row["json_offset"]), int(row["json_size"])))
    except (FileNotFoundError, ValueError) as error:
        raise DamagedShard(damaged(data.root, entries[number].tar, "is missing, or its facts are damaged")) from error
    label = data.manifest.labels("train")[number][int(row["label"])]
    return Key(row["key"].decode(), entries[number].tar, data.manifest.classes[label], str(facts.get("source", "")))


def origins(store: Path, spec: BundleSpec) -> Iterator[tuple[str, str, BundleSpec | None]]:
    """The models whose weights, or answers, this one's were made of: (how, digest, facts or None where none can be read).

    Their data is behind it, too.
    """
    following = spec
    for _ in range(_GENERATIONS):
        named = ("started from", following.init) if following.init else None
        if following.lesson:
            named = ("taught by", following.lesson.teacher)
        if named is None:
            return
        how, digest = named
        folder = bundle_path(store, digest)
        try:
            found = read_facts(folder, digest)[0]
        except ValueError:
            found = None
        yield how, digest, found
        if found is None:
            return
        following = found
