"""The datasets of a data root: which there are, and which one a person means by a few digits of its digest."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from diffusion.data import manifest
from diffusion.data.manifest import Manifest, ShardEntry, Split
from diffusion.data.pictures.buckets import shown
from diffusion.recipe import canonical_json
from diffusion.store.publish import temporary
from diffusion.store.refs import DatasetRef
from diffusion.store.storage import S3_SCHEME, LocalFolder, Storage, open_storage

LATEST = "latest"
_LATEST_FILE = "latest.json"  # in the data root
REPORT = "report.json"  # beside the manifest: facts for people, no part of the identity
_FEWEST_DIGITS = 4
_LISTED = 8  # datasets in an error message


@dataclass(frozen=True)
class Dataset:
    """A published dataset and where it lies."""

    uri: str
    manifest: Manifest

    @cached_property
    def digest(self) -> str:
        return self.manifest.digest

    @property
    def root(self) -> Storage:
        """The data root, which has its shards."""
        return manifest.root_of(self.uri)

    @cached_property
    def report(self) -> dict:
        """What `REPORT` says; empty where there is none.  Raises ValueError where it is damaged."""
        try:
            report = json.loads(open_storage(self.uri).read(REPORT))
        except FileNotFoundError:
            return {}
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{self.uri}/{REPORT}, which has figures for people alone, is damaged: remove it"
            ) from error
        return report

    def whole(self) -> DatasetRef:
        """A reference for the next stage.  Raises ValueError where a shard is missing."""
        return manifest.verify(self.uri, digest=self.digest).ref(self.uri)

    def entries(self, splits: tuple[Split, ...] = ("train", "holdout")) -> Iterator[tuple[ShardEntry, tuple[int, ...]]]:
        """Each shard, and the dataset's class index of each of the labels in it."""
        for split in splits:
            yield from zip(self.manifest.entries(split), self.manifest.labels(split), strict=True)


def places(root: Storage) -> list[str]:
    """The URIs of all datasets of a data root, by digest."""
    found = (found.name.rpartition("/") for found in root.walk("datasets/"))
    return [f"{root.uri}/{folder}" for folder, _, name in found if name == manifest.FILE]


def opened(uri: str) -> Dataset:
    """The dataset at `uri`.  Raises ValueError."""
    return Dataset(uri, manifest.load(uri))


def made_by(dataset: Manifest) -> dict[str, str]:
    """What all pictures of a dataset have in common, for people; parts of a mixture have it in common, too."""
    sizes = ", ".join(map(shown, dataset.processing.buckets))
    made = {name: str(value) for name, value in dataset.processing if name != "buckets"}
    return {"resolution": str(dataset.resolution), **made, "buckets": sizes or "none (its pictures are square)"}


def find(root: Storage, ref: str) -> Dataset:
    """The dataset that `ref` names: some first digits of its digest, `LATEST`, or a folder or s3://... of its own.

    Raises ValueError saying what there is.
    """
    if ref == LATEST:
        digest = latest(root)
        if digest is None:
            raise ValueError(f"no dataset is the latest. {_there_are(root)}")
        return _by_digits(root, digest)
    if re.fullmatch(r"[0-9a-f]{4,64}", ref):
        return _by_digits(root, ref)
    if ref.startswith(S3_SCHEME) or "/" in ref or Path(ref).expanduser().exists():
        return opened(open_storage(ref).uri.rstrip("/"))
    raise ValueError(
        f"no dataset {ref!r}: give {_FEWEST_DIGITS} or more digits of its digest, the word {LATEST}, or its folder or"
        f" s3://... . {_there_are(root)}"
    )


def _by_digits(root: Storage, digits: str) -> Dataset:
    # a place is named by the first 16 digits
    named = [uri for uri in places(root) if uri.rpartition("/")[2].startswith(digits[:16])]
    if len(named) > 1:
        raise ValueError(f"{len(named)} datasets begin with {digits}, {_list(named)}: give more digits")
    if named and (dataset := opened(named[0])).digest.startswith(digits):
        return dataset
    raise ValueError(f"no dataset's digest begins with {digits}. {_there_are(root)}")


def set_latest(root: Storage, digest: str) -> None:
    """From now on `LATEST` is the dataset with this digest."""
    said = canonical_json({"digest": digest})
    try:
        if root.read(_LATEST_FILE) == said:
            return
    except FileNotFoundError:
        pass
    root.put(_LATEST_FILE, said)


def latest(root: Storage) -> str | None:
    """The digest of the dataset that the last command gave which makes one; None where there was none yet.  Raises
    ValueError where the note of it is damaged."""
    try:
        return str(json.loads(root.read(_LATEST_FILE))["digest"])
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, UnicodeDecodeError, LookupError, TypeError) as error:
        raise ValueError(
            f"{root.uri}/{_LATEST_FILE}, which says what {LATEST} is, is damaged: name a dataset by its digest (they are in"
            f" {root.uri}/datasets), and remove it"
        ) from error


def _there_are(root: Storage) -> str:
    if not (uris := places(root)):
        return f"There is none in {root.uri}: make one with `diffusion shard --source FOLDER`"
    return f"In {root.uri} there are {_list(uris)}"


def _list(uris: list[str]) -> str:
    more = f" and {len(uris) - _LISTED} more, see `diffusion data list`" if len(uris) > _LISTED else ""
    return ", ".join(uri.rpartition("/")[2] for uri in uris[:_LISTED]) + more


@contextmanager
def local_copy(root: Storage, name: str) -> Iterator[Path]:
    """The object as a local file, for the length of the block."""
    if isinstance(root, LocalFolder):
        path = root.path(name)
        if not path.is_file():
            raise FileNotFoundError(path)
        yield path
        return
    with temporary("a copy of a shard") as folder:
        root.fetch(name, folder / "shard")
        yield folder / "shard"
