"""The manifest of a published dataset.  Its digest is the identity of the data: no paths, no times."""

from pathlib import Path
from typing import Literal

from pydantic import ValidationError, model_validator

from diffusion.recipe import Frozen, canonical_json, digest_of
from diffusion.store.publish import write_atomic
from diffusion.store.refs import DatasetRef

FILE = "manifest.json"
DUPLICATE = "duplicate"
Split = Literal["train", "holdout"]


class ShardEntry(Frozen):
    """One shard: a tar and the index of offsets beside it."""

    name: str
    split: Split
    pictures: int
    bytes: int
    sha256: str
    index: str
    index_sha256: str


class Processing(Frozen):
    """What was done to each picture; see `diffusion.data.images`."""

    background: str
    crop: Literal["centre"] = "centre"
    resize: Literal["lanczos"] = "lanczos"
    encoding: Literal["png"] = "png"


class Manifest(Frozen):
    """All facts of a dataset.  Shards are in reading order; a class's index is its place in `classes`."""

    format: Literal["diffusion-dataset/1"] = "diffusion-dataset/1"
    resolution: int
    classes: tuple[str, ...]
    train_counts: tuple[int, ...]  # pictures of each class
    holdout_counts: tuple[int, ...]
    shards: tuple[ShardEntry, ...]
    processing: Processing
    recipe_digest: str
    files: int  # of the source: train + holdout + set aside
    set_aside: dict[str, int]  # kind of reason, or "duplicate" -> files

    @model_validator(mode="after")
    def _checks(self) -> "Manifest":
        if not len(self.classes) == len(self.train_counts) == len(self.holdout_counts):
            raise ValueError(f"{len(self.classes)} classes need as many counts per split")
        for split, counts in (("train", self.train_counts), ("holdout", self.holdout_counts)):
            if sum(counts) != sum(self.counts(split)):
                raise ValueError(
                    f"split {split}: shards hold {sum(self.counts(split))} pictures, classes {sum(counts)}"
                )
        if self.files != self.images + self.holdout + sum(self.set_aside.values()):
            raise ValueError(f"{self.files} files are not pictures + files set aside")
        return self

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
        return sum(count for kind, count in self.set_aside.items() if kind != DUPLICATE)

    def entries(self, split: Split) -> tuple[ShardEntry, ...]:
        """The shards of one split, in reading order."""
        return tuple(entry for entry in self.shards if entry.split == split)

    def counts(self, split: Split) -> tuple[int, ...]:
        """Pictures in each shard of a split: what `order.Order` takes."""
        return tuple(entry.pictures for entry in self.entries(split))

    def ref(self, folder: Path) -> DatasetRef:
        """The reference to this dataset, published in `folder`."""
        return DatasetRef(
            uri=str(folder),
            digest=self.digest,
            resolution=self.resolution,
            classes=self.classes,
            images=self.images,
            holdout=self.holdout,
            rejected=self.rejected,
        )

    def save(self, folder: Path) -> None:
        """Write `folder`/manifest.json: the last file of a dataset."""
        write_atomic(folder / FILE, canonical_json(self) + b"\n")


def load(uri: str | Path, *, digest: str | None = None) -> Manifest:
    """The manifest of the dataset in folder `uri`; where `digest` is given, only that very one.  Raises ValueError."""
    path = Path(uri) / FILE
    if not path.exists():
        raise ValueError(f"{uri} holds no dataset ({FILE} is missing): make one with `diffusion shard --source FOLDER`")
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise ValueError(f"{path} is damaged: {_remake(uri)}\n{error}") from error
    if digest is not None and manifest.digest != digest:
        raise ValueError(
            f"{path} has digest {manifest.digest[:16]}, but {digest[:16]} is asked for. A published dataset never"
            f" changes, so this is another or a damaged one: {_remake(uri)}"
        )
    return manifest


def verify(uri: str | Path, *, digest: str | None = None) -> Manifest:
    """`load`, and every shard and index must be there in full length.  (Their sha256 is checked on first use.)"""
    manifest = load(uri, digest=digest)
    for entry in manifest.shards:
        path = Path(uri) / entry.name
        size = path.stat().st_size if path.exists() else None
        if size != entry.bytes:
            found = "is missing" if size is None else f"has {size:,} bytes instead of {entry.bytes:,}"
            raise ValueError(f"{path} {found}: {_remake(uri)}")
        if not (Path(uri) / entry.index).exists():
            raise ValueError(f"{Path(uri) / entry.index} is missing: {_remake(uri)}")
    return manifest


def _remake(uri: str | Path) -> str:
    return f"remove the folder {uri} and make it again with `diffusion shard`"
