"""Computing the captions of a dataset beforehand: a sidecar for every shard that has none.

A shard is one task, and its sidecar a function of the task: who makes it, in which order and how often changes no byte, so
workers need not know of each other and what is there is never made again.
"""

import hashlib
import json
from collections.abc import Callable, Iterator

from diffusion.data import manifest
from diffusion.data.manifest import ShardEntry
from diffusion.data.shards import damaged, read_index
from diffusion.data.sidecar import Computation, sidecar_bytes
from diffusion.recipe import Frozen
from diffusion.store import text_encoders
from diffusion.store.refs import DatasetRef
from diffusion.store.storage import Storage, open_storage


class Setup(Frozen):
    """All that a worker must know."""

    root: str  # URI of the data root
    by: Computation


Progress = Callable[[int, int], None]  # pictures whose captions are computed, pictures in all
Each = Callable[[Setup, list[ShardEntry]], Iterator[int]]  # pictures of each shard, in any order


def missing(dataset: DatasetRef, by: Computation) -> list[ShardEntry]:
    """The shards of a dataset, held-out ones too, that have no sidecar yet."""
    made = {found.name for found in manifest.root_of(dataset.uri).walk(by.folder)}
    return [entry for entry in _shards(dataset) if by.place(entry.sha256) not in made]


def _shards(dataset: DatasetRef) -> list[ShardEntry]:
    """Each once: parts of a mixture may share some."""
    return list({entry.sha256: entry for entry in manifest.load(dataset.uri, digest=dataset.digest).shards}.values())


def in_process(setup: Setup, entries: list[ShardEntry]) -> Iterator[int]:
    """An `Each` without any other process."""
    return map(Maker(setup), entries)


def precompute(
    dataset: DatasetRef, by: Computation, *, each: Each = in_process, progress: Progress | None = None
) -> None:
    """Make every sidecar that is missing.  Interrupted, it goes on where it was.

    Raises ValueError where a worker has another encoder, or a shard is damaged.
    """
    todo = missing(dataset, by)
    total = sum(entry.pictures for entry in _shards(dataset))
    done = total - sum(entry.pictures for entry in todo)
    for pictures in each(Setup(root=manifest.root_of(dataset.uri).uri, by=by), todo) if todo else ():
        done += pictures
        if progress:
            progress(done, total)


class Maker:
    """Makes sidecars with one encoder, which it loads once."""

    def __init__(self, setup: Setup) -> None:
        self.by, self.root = setup.by, open_storage(setup.root)
        wanted = self.by.encoder
        self.encoder = text_encoders.text_encoder(wanted.name, tokens=wanted.tokens, device=self.by.device)
        if self.encoder.identity != wanted:
            raise ValueError(
                f"the captions are to be read by {wanted}, and here is {self.encoder.identity}: give every node the same"
                " encoder"
            )

    def __call__(self, entry: ShardEntry) -> int:
        """Make the sidecar of a shard.  Returns the shard's pictures."""
        embeddings = {}
        for caption in captions_of(self.root, entry):
            text, mask = self.encoder([caption])
            embeddings[caption] = text[0][mask[0]].cpu().numpy()
        self.root.put(self.by.place(entry.sha256), sidecar_bytes(self.by, entry.sha256, embeddings))
        return entry.pictures


def captions_of(root: Storage, entry: ShardEntry) -> list[str]:
    """The different captions of a shard that are not blank, in the order of its samples.  Raises ValueError where the shard
    is damaged.  Takes the shard's size of memory.
    """
    index = read_index(root, entry)
    told = index[index["captions"] > 0]
    if not len(told):
        return []
    try:
        tar = root.read(entry.tar)
    except FileNotFoundError as error:
        raise ValueError(damaged(root, entry.tar, "is missing")) from error
    if hashlib.sha256(tar).hexdigest() != entry.sha256:
        raise ValueError(damaged(root, entry.tar, "differs from the sha256 that is its name"))
    facts = (
        json.loads(tar[start : start + size])
        for start, size in zip(told["json_offset"].tolist(), told["json_size"].tolist(), strict=True)
    )
    captions = dict.fromkeys(caption for sample in facts for caption, _ in sample["captions"])
    return [caption for caption in captions if caption.strip()]
