"""Random access to the pictures of a published dataset, wherever it lies.

Opening reads the manifest alone; the index of a shard is read, and compared with the manifest's sha256, when the first of
its pictures is asked for, and every picture's crc32 is compared with the index before it is decoded.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from math import prod
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import numpy as np

from diffusion.codec import Codec
from diffusion.data import manifest
from diffusion.data.damage import Damage, DamageLog
from diffusion.data.latents import Latents
from diffusion.data.manifest import Split
from diffusion.data.open_shards import OpenShard, OpenShards, pieces
from diffusion.data.pictures.decode import decode_into, decode_rows
from diffusion.data.shards import INDEX, DamagedShard, damaged, read_index
from diffusion.data.stored import DAMAGE, SPANS, Captions, captions_at, first_of, stored_at, undamaged
from diffusion.store.cache import ShardCache
from diffusion.store.storage import StorageUnavailable

# numpy copies what it finds by a list of places field by field, 2 us a row, unless it is asked to `take` it, or is told
# of no fields
_ROW = np.dtype((np.void, INDEX.itemsize))


def _texts(keys: np.ndarray) -> list[str]:
    """ASCII without a slash, (b,) of bytes, as text: in a third of the time that numpy takes."""
    return b"/".join(keys.tolist()).decode("ascii").split("/") if len(keys) else []


class Sample(NamedTuple):
    """One picture: uint8 (H, W, 3), its class index, and its captions."""

    key: str
    image: np.ndarray
    label: int
    captions: Captions

    @property
    def caption(self) -> str:
        """The first; "" where it has none."""
        return first_of(self.captions)


class Pictures(NamedTuple):
    """b pictures in the order they were asked for; the arrays are the caller's to change."""

    images: np.ndarray  # uint8 (b, H, W, 3)
    label: np.ndarray  # int64 (b,)
    keys: list[str]
    captions: list[Captions]  # () for a picture that has none, and where the reader reads none
    latents: np.ndarray | None = None  # float32 (b, 2, C, h, w), of a reader with a codec
    known: np.ndarray | None = None  # bool (b,): the latents that are there, whose pictures are not: `Latents.complete`

    @property
    def texts(self) -> list[str]:
        """The first caption of each."""
        return [first_of(captions) for captions in self.captions]


class ShardReader:
    """Random access to one split of a published dataset.  Safe to use from several threads.

    cache_mib: memory for decoded pictures, the first ones by index: a run passes over all pictures again and again, and
    then keeping a fixed part beats keeping the latest.  It is taken as pictures come.
    shards: local copies of the shards of a dataset that is not in a local folder; without, each picture is a request.
    captions: whether they are read at all.
    max_damaged: the share of the split that may be damaged.  A damaged picture is read again, from a shard fetched again;
    then the next good one of its shard takes its place, cyclically, and after the last shard's that of the next one that has
    its size: a function of the picture's index and of the damage.  Each process counts what it meets.  0: the first one is
    an error.
    codec: read latents instead of pictures, from the sidecars of the shards; only what none of them has is decoded.
    """

    def __init__(
        self,
        uri: str | Path,
        split: Split = "train",
        *,
        digest: str | None = None,
        cache_mib: int = 1024,
        shards: ShardCache | None = None,
        captions: bool = True,
        max_damaged: float = 0.0,
        codec: Codec | None = None,
    ) -> None:
        self.root, self.split, self.captions = manifest.root_of(uri), split, captions
        self.manifest = manifest.load(uri, digest=digest)
        self.entries = self.manifest.entries(split)
        if not self.entries:
            raise ValueError(f"{uri} has no pictures in split {split!r}: shard again with a larger `shard.holdout`")
        self.counts = tuple(entry.pictures for entry in self.entries)
        self._first = np.concatenate([[0], np.cumsum(self.counts)])  # picture of each shard, and the number of all
        # the shards of a mixture's part count classes as that part does
        parts = ((np.array(part.labels), getattr(part, split)) for part in self.manifest.parts)
        self._classes = [classes for classes, shards in parts for _ in range(shards)]
        self._shards = OpenShards(self.root, self.entries, shards)
        self.damage = DamageLog(len(self), max_damaged)
        self._fetched_again: set[int] = set()
        self._forgetting = Lock()
        self.sizes = self.manifest.sizes(split)  # (height, width) in each shard
        room = 3 * max(height * width for height, width in set(self.sizes))  # for a picture of any size
        cached = min(len(self), cache_mib * 2**20 // room)
        self._pictures = np.empty((cached, room), np.uint8)
        sha256s = [entry.sha256 for entry in self.entries]
        self.latents = Latents(self.root, sha256s, codec, self.manifest.resolution) if codec else None
        self._captions: list[Captions] = [()] * cached if captions else []
        self._filled = np.zeros(cached, bool)

    def __len__(self) -> int:
        return int(self._first[-1])

    @cached_property
    def keys(self) -> list[str]:
        """Of all pictures: reads every index."""
        return [key.decode() for keys in self._columns("key") for key in keys.tolist()]

    @cached_property
    def labels(self) -> np.ndarray:
        """Of all pictures, int64: reads every index."""
        return np.concatenate([self._class(n, labels) for n, labels in enumerate(self._columns("label"))]).astype(
            np.int64
        )

    def _columns(self, name: str) -> list[np.ndarray]:
        """A column of the index of each shard."""
        with ThreadPoolExecutor(8, thread_name_prefix="indexes") as pool:
            return list(pool.map(lambda entry: read_index(self.root, entry)[name].copy(), self.entries))

    def _class(self, shard: int, labels: np.ndarray) -> np.ndarray:
        """Labels in a shard -> labels in the dataset."""
        return self._classes[shard][labels] if self._classes else labels

    @property
    def cache(self) -> ShardCache | None:
        """Where local copies of shards are made before they are read, if anywhere."""
        return self._shards.cache

    def shards_of(self, pictures: np.ndarray) -> np.ndarray:
        """Numbers of the shards of pictures, (b,)."""
        return np.searchsorted(self._first, pictures, side="right") - 1

    def fetch(self, shard: int) -> None:
        """Have the local copy of a shard ready, where there are such copies."""
        self._shards.fetch(shard)

    def read(self, i: int) -> Sample:
        """Picture i of the split.  Raises ValueError naming shard, key and command where it is damaged."""
        if not 0 <= i < len(self):
            raise IndexError(f"picture {i} of {len(self)}")
        got = self.gather(np.array([i]))
        return Sample(got.keys[0], got.images[0], int(got.label[0]), got.captions[0])

    def gather(self, pictures: np.ndarray) -> Pictures:
        """The pictures of these indices, (b,), all of one size, or their latents as far as they are known.  Raises
        TooMuchDamage, a ValueError."""
        b, turn = len(pictures), np.argsort(pictures, kind="stable")
        asked = pictures[turn]  # from here on all is in this turn: a shard's pictures side by side, as they lie in it
        shards = self.shards_of(asked)
        starts = [0, *(np.flatnonzero(shards[1:] != shards[:-1]) + 1).tolist()][:b]
        numbers = shards[starts].tolist()
        sizes = {self.sizes[shard] for shard in numbers} or {self.sizes[0]}
        if len(sizes) > 1:
            raise ValueError(f"pictures of the sizes {sorted(sizes)} make no batch: gather those of one size at a time")
        got = Pictures(np.empty((b, *sizes.pop(), 3), np.uint8), np.empty(b, np.int64), [""] * b, [()] * b)
        if self.latents:
            got = got._replace(latents=np.empty((b, *self.latents.shape), np.float32), known=np.zeros(b, bool))
        rows, there = np.zeros(b, INDEX), np.ones(b, bool)
        kept = asked < len(self._filled)  # in memory
        kept[kept] = self._filled[asked[kept]]
        wanted = ~kept
        within = asked - self._first[shards]  # place in the shard
        stored: list[bytes | memoryview] = []
        for shard, start, end in zip(numbers, starts, [*starts[1:], b], strict=False):
            part = slice(start, end)
            try:
                opened = self._open(shard)
            except DamagedShard:
                there[part] = kept[part] = wanted[part] = False
                continue
            rows.view(_ROW)[part] = opened.index.view(_ROW).take(within[part])
            if self._classes:
                rows["label"][part] = self._class(shard, rows["label"][part])
            if self.latents:
                found = self._find(shard, opened, within[part], turn[part], got)
                kept[part] &= ~found
                wanted[part] &= ~found
            stored += self._stored(opened, rows[part], turn[part], wanted[part], got)
        # all are read, then all summed, then all decoded: what Python does between two pictures costs twice as much when
        # the decoder has emptied the processor's caches
        if not self.captions:
            stored = undamaged(stored, rows["image_crc32"][wanted].tolist())
        bad = list(decode_rows(stored, got.images, turn[wanted].tolist(), known=True))
        back = np.empty(b, np.int64)
        back[turn] = np.arange(b)
        found = rows.view(_ROW).take(back).view(INDEX)
        got.keys[:], got.label[:] = _texts(found["key"]), found["label"]
        self._remembered(asked[kept], turn[kept], got)
        for place in sorted((*bad, *turn[~there].tolist())):
            at = int(back[place])
            repair = self._again if there[at] else self._substitute
            repair(int(shards[at]), int(within[at]), place, got)
        wanted[back[bad]] = False
        self._remember(asked[wanted], turn[wanted], got)
        return got

    def by_size(self, pictures: np.ndarray) -> list[np.ndarray]:
        """Where among these pictures, (b,), those of one size are: places (n,) ascending for each size, in a fixed order."""
        known = sorted(set(self.sizes))
        size = np.array([known.index(size) for size in self.sizes])[self.shards_of(pictures)]
        return [np.flatnonzero(size == number) for number in np.unique(size)]

    def _remembered(self, pictures: np.ndarray, places: np.ndarray, got: Pictures) -> None:
        """Pictures that are kept in memory into their places."""
        if not len(pictures):
            return
        shape = got.images.shape[1:]
        got.images[places] = self._pictures[pictures, : prod(shape)].reshape(-1, *shape)
        if self.captions:
            for place, picture in zip(places.tolist(), pictures.tolist(), strict=True):
                got.captions[place] = self._captions[picture]

    def _remember(self, pictures: np.ndarray, places: np.ndarray, got: Pictures) -> None:
        """Keep those that there is memory for.  Two threads may both do this, with the same bytes; the mark comes last."""
        if not len(self._filled):
            return
        kept = pictures < len(self._filled)
        pictures, places = pictures[kept], places[kept]
        numbers = prod(got.images.shape[1:])
        self._pictures[pictures, :numbers] = got.images[places].reshape(-1, numbers)
        if self.captions:
            for place, picture in zip(places.tolist(), pictures.tolist(), strict=True):
                self._captions[picture] = got.captions[place]
        self._filled[pictures] = True

    def _find(
        self, shard: int, opened: OpenShard, numbers: np.ndarray, places: np.ndarray, got: Pictures
    ) -> np.ndarray:
        """Latents, and captions, of pictures of one shard into their places.  Returns which of them are known, (n,) bool.
        What fails is left to who reads the picture."""
        found = np.zeros(len(numbers), bool)
        for n, (number, place) in enumerate(zip(numbers.tolist(), places.tolist(), strict=True)):
            latent = self.latents.find(shard, number)
            if latent is None:
                continue
            if self.captions:
                try:
                    got.captions[place] = captions_at(opened.read, opened.index[number : number + 1][SPANS].tolist()[0])
                except StorageUnavailable:
                    raise
                except DAMAGE:
                    continue
            got.latents[place], found[n] = latent, True
        got.known[places] = found
        return found

    def _stored(
        self, opened: OpenShard, rows: np.ndarray, places: np.ndarray, wanted: np.ndarray, got: Pictures
    ) -> list[bytes | memoryview]:
        """The bytes of the wanted pictures, (n,) bool, of some rows of an index, none for one that cannot be read; with
        captions, which go into their places, none either for one that is damaged."""
        if not wanted.all():
            rows, places = rows[wanted], places[wanted]
        if not self.captions:
            try:
                return pieces(opened.read, rows["image_size"].tolist(), rows["image_offset"].tolist())
            except StorageUnavailable:  # says nothing about the pictures
                raise
            except OSError:  # of one of them: which one shows when each is read
                pass
        stored = []
        for row, place in zip(rows[SPANS].tolist(), places.tolist(), strict=True):
            try:
                data, got.captions[place] = stored_at(opened.read, row, self.captions)
            except StorageUnavailable:
                raise
            except DAMAGE:
                data = b""
            stored.append(data)
        return stored

    def _open(self, shard: int) -> OpenShard:
        """Raises DamagedShard where a shard is lost: counted, and not looked for again."""
        pictures = self._pictures_of(shard)
        tar = self.entries[shard].tar
        if self.damage.known(pictures):
            raise DamagedShard(tar)
        try:
            return self._shards.get(shard)
        except DamagedShard:
            try:
                self._shards.forget(shard)
                return self._shards.get(shard)
            except DamagedShard as error:
                self.damage.note(pictures, Damage(tar, "", str(error), len(pictures)), str(error))
                raise

    def _pictures_of(self, shard: int) -> range:
        return range(int(self._first[shard]), int(self._first[shard + 1]))

    def _again(self, shard: int, i: int, place: int, got: Pictures) -> None:
        """Read picture i of a shard, found damaged, once more: from a file opened, or a copy fetched, again."""
        with self._forgetting:  # who meets damage meanwhile waits, and reads what is opened afterwards
            if shard not in self._fetched_again or self._shards.cache is None:
                self._fetched_again.add(shard)
                self._shards.forget(shard)
        if not self._good(shard, i, place, got):
            self._substitute(shard, i, place, got)

    def _substitute(self, shard: int, i: int, place: int, got: Pictures) -> None:
        """The next good picture after picture i of a shard, as the class says."""
        if not any(self._good(*other, place, got) for other in self._others(shard, i)):
            size = "{1} x {0}".format(*self.sizes[shard])
            raise ValueError(f"no picture of {size} of split {self.split!r} can be read: {self.entries[shard].tar}")

    def _others(self, shard: int, i: int) -> Iterator[tuple[int, int]]:
        """(shard, place in it) of every other picture of the same size, those of the same shard first."""
        for step in range(len(self.entries)):
            number = (shard + step) % len(self.entries)
            count = self.counts[number]
            if self.sizes[number] == self.sizes[shard] and not self.damage.known(self._pictures_of(number)):
                yield from ((number, (i + further) % count) for further in range(step == 0, count))

    def _good(self, shard: int, i: int, place: int, got: Pictures) -> bool:
        """Whether picture i of a shard is undamaged; it is in its place then, and else counted."""
        picture = self._pictures_of(shard)[i : i + 1]
        if self.damage.known(picture):
            return False
        try:
            opened = self._open(shard)
        except DamagedShard:
            return False
        own = opened.index[i : i + 1]
        key = own["key"][0].decode()
        try:
            picture_bytes, got.captions[place] = stored_at(opened.read, own[SPANS].tolist()[0], self.captions)
            decode_into(picture_bytes, got.images[place])
        except StorageUnavailable:
            raise
        except DAMAGE as error:
            tar = self.entries[shard].tar
            advice = damaged(self.root, tar, f"has a damaged sample, key {key} ({error})")
            self.damage.note(picture, Damage(tar, key, str(error), 1), advice)
            return False
        got.keys[place], got.label[place] = key, self._class(shard, own["label"])[0]
        return True
