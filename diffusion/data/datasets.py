"""The datasets of a data root: which there are, and which one a person means by a few digits of its digest."""

import json
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from diffusion.data import manifest
from diffusion.data.manifest import Manifest, ShardEntry, Split
from diffusion.store.refs import DatasetRef
from diffusion.store.storage import S3_SCHEME, LocalFolder, Storage, open_storage

LATEST = "latest"
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
        """What `REPORT` says; empty where there is none."""
        try:
            return json.loads(open_storage(self.uri).read(REPORT))
        except FileNotFoundError:
            return {}

    @property
    def published(self) -> str:
        """When, in UTC as 2026-01-31T12:00:00Z; "" where it is not known."""
        return self.report.get("published", "")

    def whole(self) -> DatasetRef:
        """A reference for the next stage.  Raises ValueError where a shard is missing."""
        return manifest.verify(self.uri, digest=self.digest).ref(self.uri)

    def entries(self, splits: tuple[Split, ...] = ("train", "holdout")) -> Iterator[tuple[ShardEntry, tuple[int, ...]]]:
        """Each shard, and the dataset's class index of each of the labels in it."""
        for split in splits:
            yield from zip(self.manifest.entries(split), self.manifest.labels(split), strict=True)


def every(root: Storage) -> Iterator[Dataset]:
    """All datasets of a data root, by digest.  Raises ValueError for a damaged one."""
    for found in root.walk("datasets/"):
        folder, _, name = found.name.rpartition("/")
        if name == manifest.FILE:
            uri = f"{root.uri}/{folder}"
            yield Dataset(uri, manifest.load(uri))


def find(root: Storage, ref: str) -> Dataset:
    """The dataset that `ref` names: some first digits of its digest, `LATEST`, or a folder or s3://... of its own.

    Raises ValueError saying what there is.
    """
    if ref == LATEST:
        if not (found := by_time(root)):
            raise ValueError(_there_are(root))
        return found[-1]
    if re.fullmatch(r"[0-9a-f]{4,64}", ref):
        return _by_digits(root, ref)
    if ref.startswith(S3_SCHEME) or "/" in ref or Path(ref).expanduser().exists():
        uri = open_storage(ref).uri.rstrip("/")
        return Dataset(uri, manifest.load(uri))
    raise ValueError(
        f"no dataset {ref!r}: give {_FEWEST_DIGITS} or more digits of its digest, the word {LATEST}, or its folder or"
        f" s3://... . {_there_are(root)}"
    )


def _by_digits(root: Storage, digits: str) -> Dataset:
    # a place has the first 16 digits of the digest
    names = sorted({found.name.split("/")[1] for found in root.walk(f"datasets/{digits[:16]}")})
    found = [dataset for name in names if (dataset := _load(root, name)) and dataset.digest.startswith(digits)]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(
            f"{digits} are the first digits of {len(found)} datasets: give more of them. {_list([d.digest for d in found])}"
        )
    raise ValueError(f"no dataset's digest begins with {digits}. {_there_are(root)}")


def _load(root: Storage, name: str) -> Dataset | None:
    uri = f"{root.uri}/datasets/{name}"
    return Dataset(uri, manifest.load(uri)) if root.size(f"datasets/{name}/{manifest.FILE}") is not None else None


def by_time(root: Storage) -> list[Dataset]:
    """All datasets of a data root, the one that was published last at the end."""
    return sorted(every(root), key=lambda dataset: (dataset.published, dataset.digest))


def _there_are(root: Storage) -> str:
    names = sorted({found.name.split("/")[1] for found in root.walk("datasets/") if found.name.endswith(manifest.FILE)})
    if not names:
        return f"There is none in {root.uri}: make one with `diffusion shard --source FOLDER`"
    return f"In {root.uri}: {_list(names)}"


def _list(digests: list[str]) -> str:
    more = f" and {len(digests) - _LISTED} more, see `diffusion data list`" if len(digests) > _LISTED else ""
    return ", ".join(digest[:16] for digest in digests[:_LISTED]) + more


@contextmanager
def local_copy(root: Storage, name: str) -> Iterator[Path]:
    """The object as a local file, for the length of the block."""
    if isinstance(root, LocalFolder):
        path = root.path(name)
        if not path.is_file():
            raise FileNotFoundError(path)
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "shard")
        root.fetch(name, path)
        yield path
