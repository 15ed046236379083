"""The manifest of a published dataset.  Its digest is the identity of the data: no paths, no times."""

import gc
import hashlib
import re
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import Field, ValidationError, model_validator

from diffusion.data.pictures.bad_picture import NEAR_DUPLICATE
from diffusion.data.pictures.buckets import Size
from diffusion.recipe import Frozen, canonical_json, digest_of, first_mistake, unset
from diffusion.store.refs import DatasetRef
from diffusion.store.storage import Storage, open_storage

FILE = "manifest.json"
DUPLICATE = "duplicate"
NOT_DAMAGE = (DUPLICATE, NEAR_DUPLICATE)  # kinds of files that are set aside because another one is kept
ASKED_AT_A_TIME = 16  # of a storage that is far away
Split = Literal["train", "holdout"]
Encoding = Literal["png", "jpeg"]


class ShardEntry(Frozen):
    """One shard: a tar, named by the sha256 of its bytes, and the index beside it.  Datasets share equal shards."""

    split: Split
    pictures: int
    bytes: int
    sha256: str
    index_sha256: str
    size: Size | None = Field(None, exclude_if=unset)  # of its pictures, where they are not the dataset's square

    @property
    def tar(self) -> str:
        """Where the tar lies in the data root."""
        return f"shards/{self.sha256[:2]}/{self.sha256}.tar"

    @property
    def index(self) -> str:
        """Where its index lies in the data root."""
        return f"shards/{self.sha256[:2]}/{self.sha256}.npy"


class Processing(Frozen):
    """What was done to each picture; see `diffusion.data.images`."""

    background: str
    crop: Literal["centre"] = "centre"
    resize: Literal["lanczos"] = "lanczos"
    encoding: Encoding = "png"
    buckets: tuple[Size, ...] = Field(
        (), exclude_if=unset
    )  # a picture has the one nearest to its shape; (): the square


class Part(Frozen):
    """One dataset of a mixture.  Its shards follow each other in the manifest, after those of the parts before it."""

    dataset: str  # digest
    weight: Annotated[
        float, Field(gt=0)
    ]  # of a training picture of the mixture coming from here, relative to the others
    labels: tuple[int, ...]  # class index in its shards -> class index in the mixture
    train: int  # shards
    holdout: int


class Manifest(Frozen):
    """All facts of a dataset.  Shards are in reading order; a class's index is its place in `classes`.

    A shard's pictures have one size.  Within a split, and a part, shards of one size follow each other, from the highest
    to the widest.
    """

    format: Literal["diffusion-dataset/2"] = "diffusion-dataset/2"
    resolution: int
    classes: tuple[str, ...]
    train_counts: tuple[int, ...]  # pictures of each class
    holdout_counts: tuple[int, ...]
    shards: tuple[ShardEntry, ...]
    processing: Processing
    recipe_digest: str
    files: int  # of the source: train + holdout + set aside
    set_aside: dict[str, int]  # kind of reason -> files
    parent: str | None = None  # digest of the dataset that this one goes on from
    # sha256 of files that people let pass though a policy held them back, sorted
    released: tuple[str, ...] = Field((), exclude_if=unset)
    parts: tuple[Part, ...] = Field((), exclude_if=unset)  # of a mixture

    @model_validator(mode="after")
    def _checks(self) -> "Manifest":
        if not len(self.classes) == len(self.train_counts) == len(self.holdout_counts):
            raise ValueError(f"{len(self.classes)} classes need as many counts per split")
        held = {"train": 0, "holdout": 0}
        for entry in self.shards:
            held[entry.split] += entry.pictures
        for split, counts in (("train", self.train_counts), ("holdout", self.holdout_counts)):
            if sum(counts) != held[split]:
                raise ValueError(f"split {split}: shards hold {held[split]} pictures, classes {sum(counts)}")
        if self.files != self.images + self.holdout + sum(self.set_aside.values()):
            raise ValueError(f"{self.files} files are not pictures + files set aside")
        if self.parts:
            for split in get_args(Split):
                if len(self.entries(split)) != sum(getattr(part, split) for part in self.parts):
                    raise ValueError(f"split {split}: the parts do not have its {len(self.entries(split))} shards")
            if any(not 0 <= label < len(self.classes) for part in self.parts for label in part.labels):
                raise ValueError(f"a part has a class that is none of the {len(self.classes)}")
        self._check_sizes()
        return self

    def _check_sizes(self) -> None:
        place = {size: n for n, size in enumerate(self.processing.buckets)}
        if odd := next((entry for entry in self.shards if entry.size and entry.size not in place), None):
            raise ValueError(f"{odd.tar} has pictures of {odd.size}, which is no size of this dataset")
        for split in get_args(Split) if place else ():
            entries = iter(self.entries(split))
            for shards in [getattr(part, split) for part in self.parts] or [None]:
                places = [place.get(self.size_of(entry), -1) for entry in islice(entries, shards)]
                if places != sorted(places):
                    raise ValueError(f"split {split}: shards of one size do not follow each other")

    @property
    def digest(self) -> str:
        """sha256 of the canonical JSON, 64 hex digits: the identity of the data."""
        return digest_of(self)

    @property
    def images(self) -> int:
        """Training pictures."""
        return sum(self.train_counts)

    @property
    def holdout(self) -> int:
        """Pictures held out of training."""
        return sum(self.holdout_counts)

    @property
    def rejected(self) -> int:
        """Files that could not be used.  Duplicates are not among them: nothing is wrong with those."""
        return sum(count for kind, count in self.set_aside.items() if kind not in NOT_DAMAGE)

    def entries(self, split: Split) -> tuple[ShardEntry, ...]:
        """The shards of one split, in reading order."""
        return tuple(entry for entry in self.shards if entry.split == split)

    def counts(self, split: Split) -> tuple[int, ...]:
        """Pictures in each shard of a split: what `order.Order` takes."""
        return tuple(entry.pictures for entry in self.entries(split))

    def size_of(self, entry: ShardEntry) -> Size:
        """(height, width) of the pictures in a shard."""
        return entry.size or (self.resolution, self.resolution)

    def sizes(self, split: Split) -> tuple[Size, ...]:
        """(height, width) of the pictures in each shard of a split."""
        entries = self.entries(split)
        if not self.processing.buckets:
            return ((self.resolution, self.resolution),) * len(entries)
        return tuple(map(self.size_of, entries))

    def by_size(self, split: Split) -> dict[Size, int]:
        """Size -> pictures of a split, from the highest to the widest, those that have any."""
        found: Counter[Size] = Counter()
        for size, pictures in zip(self.sizes(split), self.counts(split), strict=True):
            found[size] += pictures
        return {size: found[size] for size in self.processing.buckets or found if size in found}

    def labels(self, split: Split) -> tuple[tuple[int, ...], ...]:
        """For each shard of a split: class index in the shard -> class index in this dataset."""
        if not self.parts:
            return (tuple(range(len(self.classes))),) * len(self.entries(split))
        return tuple(part.labels for part in self.parts for _ in range(getattr(part, split)))

    def ref(self, uri: str) -> DatasetRef:
        """The reference to this dataset, published at `uri`."""
        return DatasetRef(
            uri=uri,
            digest=self.digest,
            resolution=self.resolution,
            classes=self.classes,
            images=self.images,
            holdout=self.holdout,
            rejected=self.rejected,
            sizes=tuple(self.by_size("train")) if self.processing.buckets else (),
        )


def place_of(digest: str) -> str:
    """Where the dataset with this digest lies in the data root."""
    return f"datasets/{digest[:16]}"


def root_of(uri: str | Path) -> Storage:
    """The data root that the dataset at `uri` lies in: its shards are there."""
    return open_storage(str(uri).rstrip("/").rsplit("/", 2)[0])


def publish(manifest: Manifest, root: Storage) -> str:
    """Put the manifest in its place, as the last file of its dataset.  Returns the dataset's URI."""
    root.put(f"{place_of(manifest.digest)}/{FILE}", canonical_json(manifest) + b"\n")
    return f"{root.uri}/{place_of(manifest.digest)}"


def load(uri: str | Path, *, digest: str | None = None) -> Manifest:
    """The manifest of the dataset at `uri`; where `digest` is given, only that very one.  A folder that is named for a
    digest must hold it.  Raises ValueError.
    """
    try:
        data = open_storage(uri).read(FILE)
    except FileNotFoundError as error:
        raise ValueError(
            f"{uri} holds no dataset ({FILE} is missing): make one with `diffusion shard --source FOLDER`"
        ) from error
    try:
        with _no_collection():
            manifest = Manifest.model_validate_json(data)
    except ValidationError as error:
        raise ValueError(f"{uri}/{FILE} is damaged ({first_mistake(error)}): {_remake(uri)}") from error
    actual = hashlib.sha256(data.removesuffix(b"\n")).hexdigest()  # canonical JSON, so no need to write it again
    if digest is not None and actual != digest:
        raise ValueError(
            f"{uri}/{FILE} has digest {actual[:16]}, but {digest[:16]} is asked for. A published dataset never"
            f" changes, so this is another or a damaged one: {_remake(uri)}"
        )
    place = str(uri).rstrip("/").rpartition("/")[2]
    if re.fullmatch(r"[0-9a-f]{16}", place) and not actual.startswith(place):
        raise ValueError(
            f"{uri}/{FILE} has digest {actual[:16]}, and its folder is named for another. A published dataset never"
            f" changes, so this one is damaged: {_remake(uri)}"
        )
    return manifest


@contextmanager
def _no_collection() -> Iterator[None]:
    """Without Python's search for cycles, which the entries of 10,000 shards start and which finds none: beside a library
    as large as torch it takes 60 of 80 ms."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def verify(uri: str | Path, *, digest: str | None = None) -> Manifest:
    """`load`, and every shard and index must be there in full length.  (Their content is checked on use.)"""
    manifest, root = load(uri, digest=digest), root_of(uri)

    def wrong(entry: ShardEntry) -> str | None:
        size = root.size(entry.tar)
        if size != entry.bytes:
            found = "is missing" if size is None else f"has {size:,} bytes instead of {entry.bytes:,}"
            return f"{root.uri}/{entry.tar} {found}"
        return f"{root.uri}/{entry.index} is missing" if root.size(entry.index) is None else None

    with ThreadPoolExecutor(ASKED_AT_A_TIME) as pool:
        for what in pool.map(wrong, manifest.shards):
            if what:
                raise ValueError(f"{what}: {_remake(uri)}")
    return manifest


def _remake(uri: str | Path) -> str:
    return f"remove {uri} and make it again with `diffusion shard`"
