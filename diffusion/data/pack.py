"""The two tasks of the shard stage that run on any worker: decode a chunk of files, write a shard.

Tasks and results are plain JSON values.  A task done twice, or by two workers at once, does no harm: what it writes appears
whole, under a name that its content or its input determines.
"""

import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from hashlib import sha256
from pathlib import Path

import numpy as np
from zlib_ng.zlib_ng import crc32

from diffusion.data import images, quarantine
from diffusion.data.pictures.bad_picture import BadPicture
from diffusion.data.pictures.buckets import size_for
from diffusion.data.pictures.fit import check_wanted, opaque
from diffusion.data.pictures.near import perceptual_hash
from diffusion.data.shards import PackedSample, damaged, parse_index, put_shard, write_shard
from diffusion.data.sources import read_item
from diffusion.recipe import ShardRecipe
from diffusion.store.publish import PREFIX, room_in
from diffusion.store.storage import LocalFolder, Storage, open_storage

_READERS = 16  # ranged reads at a time from a storage that is far away


def read_original(uri: str, place: str) -> bytes:
    """The bytes of a file of a source, or of one in quarantine.  Raises BadPicture (unreadable, too large)."""
    if quarantine.is_place(place):
        return quarantine.read_place(uri, place)
    return read_item(uri, place)


def decode_chunk(task: dict) -> dict:
    """Decode files and put their encoded pictures together, as one object.

    task: source, files [[name, mark, place], ...], recipe, released (sha256 of files that no policy holds back), blobs
    (storage), blob (name).  Each file becomes a row: its facts, or why it is set aside.
    """
    recipe, released = ShardRecipe(**task["recipe"]), set(task["released"])
    rows, parts, offset = [], [], 0
    for name, mark, place in task["files"]:
        row = {"name": name, "mark": mark}
        rows.append(row)
        try:
            data = read_original(task["source"], place)
            row |= {"file": sha256(data).hexdigest(), "bytes": len(data)}
            facts, encoded = prepare(data, recipe, row["file"] in released)
        except BadPicture as error:
            row |= {"kind": error.kind, "detail": error.detail}
            continue
        row |= facts | {"image": [task["blobs"], task["blob"], offset, len(encoded), crc32(encoded)]}
        parts.append(encoded)
        offset += len(encoded)
    if parts:
        open_storage(task["blobs"]).put(task["blob"], b"".join(parts))
    return {"rows": rows}


def prepare(data: bytes, recipe: ShardRecipe, released: bool) -> tuple[dict, bytes]:
    """A file's bytes -> facts, and the encoded picture.  Raises BadPicture; of a released file only where it is damaged."""
    picture = images.decode_all(data)
    height, width = picture.shape[:2]
    if not released:
        check_wanted(width, height, min_side=recipe.min_side, max_aspect=recipe.max_aspect)
    size = size_for(width, height, recipe)
    pixels = images.fit(picture, size=size, background=recipe.background)
    facts = {
        "content": images.content_digest(picture),
        "pixels": _pixels_digest(pixels, recipe),
        "width": width,
        "height": height,
    }
    if recipe.near_duplicates is not None:
        look = perceptual_hash(opaque(picture, recipe.background))
        facts["hash"] = None if look is None else f"{look:016x}"
    if recipe.encoding == "jpeg":
        return facts, images.encode_jpeg(pixels, recipe.jpeg_quality)
    return facts, images.encode_png(pixels)


def _pixels_digest(pixels: np.ndarray, recipe: ShardRecipe) -> str:
    """sha256 of a picture of the dataset, by which equal ones are found: of two white pages that differ in shape as well."""
    shape = "" if recipe.bucket_aspect is None else "{}x{}:".format(*pixels.shape[:2])
    digest = sha256(shape.encode())
    digest.update(pixels)
    return digest.hexdigest()


def pack_shard(task: dict) -> dict:
    """Write one shard and put it in its place.

    task: digest (of the samples), root (storage), scratch (folder for temporary files; None: the system's), split,
    encoding, size (of its pictures; None: square), samples (key, label, facts, image place).  Returns the digest, the
    shard's manifest entry, and [offset, size, crc32] of each picture in it.
    """
    root = open_storage(task["root"])
    with tempfile.TemporaryDirectory(prefix=PREFIX, dir=task["scratch"]) as name:
        folder = Path(name)
        with room_in(folder.parent, "a shard"):
            samples = _packed(task["samples"])
            entry = write_shard(folder, task["split"], samples, task["encoding"], size=task["size"])
        index = parse_index((folder / Path(entry.index).name).read_bytes(), entry.pictures)
        put_shard(root, folder, entry)
    spans = zip(index["image_offset"], index["image_size"], index["image_crc32"], strict=True)
    return {
        "digest": task["digest"],
        "entry": entry.model_dump(),
        "images": [[int(number) for number in span] for span in spans],
    }


def _packed(samples: list[dict]) -> Iterator[PackedSample]:
    places = [sample["image"] for sample in samples]
    near = all(isinstance(_storage(place[0]), LocalFolder) for place in places)
    with ThreadPoolExecutor(1 if near else _READERS) as pool:
        for sample, image in zip(
            samples, map(_read_image, places) if near else pool.map(_read_image, places), strict=True
        ):
            yield PackedSample(sample["key"], sample["label"], sample["facts"], image)


def _read_image(place: list) -> bytes:
    uri, name, offset, size, total = place
    storage = _storage(uri)
    try:
        data = storage.read(name, offset, size)
    except FileNotFoundError as error:
        raise ValueError(_spoilt(storage, name, "is missing")) from error
    if crc32(data) != total:
        raise ValueError(_spoilt(storage, name, f"has other bytes at {offset} than were written there"))
    return data


def _spoilt(storage: Storage, name: str, what: str) -> str:
    if name.startswith("shards/"):
        return damaged(storage, name, what)
    return f"{storage.uri}/{name}, a temporary file, {what}: start over with `diffusion shard --fresh`"


_storage = lru_cache(maxsize=8)(open_storage)
