"""Computing beforehand what a run reads of a dataset, embeddings of captions and latents of pictures: a sidecar for every
shard that has none.

A shard is one task, and its sidecar a function of the task: who makes it, in which order and how often changes no byte, so
workers need not know of each other and what is there is never made again.
"""

import hashlib
import json
from collections.abc import Callable, Iterator

import numpy as np

from diffusion.codec import Codec, CodecIdentity
from diffusion.data import manifest
from diffusion.data.datasets import local_copy
from diffusion.data.latents import encoded, shape_of, write_latents
from diffusion.data.manifest import ShardEntry
from diffusion.data.pictures.decode import decode_into
from diffusion.data.precomputed import Computation
from diffusion.data.shards import check_shard, damaged, read_index
from diffusion.data.sidecar import sidecar_bytes
from diffusion.recipe import Frozen
from diffusion.store import codecs, text_encoders
from diffusion.store.publish import temporary
from diffusion.store.refs import DatasetRef
from diffusion.store.storage import Storage, open_storage
from diffusion.text import TextEncoder


class Setup(Frozen):
    """All that a worker must know."""

    root: str  # URI of the data root
    by: Computation
    resolution: int | None = None  # of the pictures; captions can do without


Progress = Callable[[int, int], None]  # pictures of shards that have a sidecar, pictures in all
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
    setup = Setup(root=manifest.root_of(dataset.uri).uri, by=by, resolution=dataset.resolution)
    for pictures in each(setup, todo) if todo else ():
        done += pictures
        if progress:
            progress(done, total)


class Maker:
    """Makes sidecars with one encoder, which it loads once."""

    def __init__(self, setup: Setup) -> None:
        self.setup, self.root = setup, open_storage(setup.root)
        self.encoder = _encoder(setup.by)

    def __call__(self, entry: ShardEntry) -> int:
        """Make the sidecar of a shard.  Returns the shard's pictures."""
        by, encoder = self.setup.by, self.encoder
        if isinstance(encoder, TextEncoder):
            self.root.put(
                by.place(entry.sha256), sidecar_bytes(by, entry.sha256, embeddings_of(self.root, entry, encoder))
            )
            return entry.pictures
        with temporary("latents of a shard") as folder:
            file = folder / "sidecar"
            shape = shape_of(encoder.identity, self.setup.resolution)
            latents = latents_of(self.root, entry, encoder, self.setup.resolution)
            write_latents(file, by, entry.sha256, latents, pictures=entry.pictures, shape=shape)
            self.root.put(by.place(entry.sha256), file)
        return entry.pictures


def _encoder(by: Computation) -> TextEncoder | Codec:
    """What computes so, here.  Raises ValueError where that is another."""
    wanted = by.encoder
    if isinstance(wanted, CodecIdentity):
        return codecs.codec_named(wanted, by.device)
    encoder = text_encoders.text_encoder(wanted.name, tokens=wanted.tokens, device=by.device)
    if encoder.identity != wanted:
        raise ValueError(
            f"the captions are to be read by {wanted}, and here is {encoder.identity}: give every node the same encoder"
        )
    return encoder


def latents_of(root: Storage, entry: ShardEntry, codec: Codec, resolution: int) -> Iterator[np.ndarray]:
    """The latents (2, C, h, w) of each picture of a shard, in its order.  Raises ValueError where the shard is damaged.

    One picture is in memory at a time.
    """
    index = read_index(root, entry)
    picture = np.empty((1, resolution, resolution, 3), np.uint8)
    try:
        with local_copy(root, entry.tar) as path, open(path, "rb") as tar:
            check_shard(root, entry, path)
            for key, start, size in index[["key", "image_offset", "image_size"]].tolist():
                tar.seek(start)
                decode_into(tar.read(size), picture[0])
                (latent,) = encoded(codec, picture)
                if not np.isfinite(latent).all():
                    raise ValueError(f"{codec.identity} gives numbers that are not finite for picture {key.decode()}")
                yield latent
    except FileNotFoundError as error:
        raise ValueError(damaged(root, entry.tar, "is missing")) from error


def embeddings_of(root: Storage, entry: ShardEntry, encoder: TextEncoder) -> dict[str, np.ndarray]:
    """The embedding (tokens, width) of each of `captions_of` a shard."""
    embeddings = {}
    for caption in captions_of(root, entry):
        text, mask = encoder([caption])
        embeddings[caption] = text[0][mask[0]].cpu().numpy()
    return embeddings


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
