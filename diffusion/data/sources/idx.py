"""IDX files, the format of MNIST and its family: `train-images-idx3-ubyte` with `train-labels-idx1-ubyte` beside, each also
as .gz.  Every other split beside (t10k, test) is read too: what is held out is chosen by content.

A header of big-endian numbers (0, 0, 8 for unsigned bytes, the number of dimensions, then each dimension), then the bytes.
"""

import math
import os
import re
from collections.abc import Iterator

from diffusion.data.pictures.pixels import MAX_PIXELS
from diffusion.data.sources.items import BadSource, File, Item, item_of
from diffusion.data.sources.listing import Listing
from diffusion.data.sources.places import file_of, place, unpacked

IMAGES = re.compile(r"(^|/)(?P<split>[^/]*?)-?images[-.]idx3-ubyte(\.gz)?$")
LABELS = re.compile(r"(^|/)(?P<split>[^/]*?)-?labels[-.]idx1-ubyte(\.gz)?$")
_UNSIGNED_BYTES = 8


def labels_of(images: str) -> tuple[str, str]:
    """What the file of labels beside a file of pictures may be called."""
    labels = images.removesuffix(".gz").replace("images", "labels").replace("idx3", "idx1")
    return labels, labels + ".gz"


def idx_items(listing: Listing, files: list[File]) -> Iterator[Item]:
    """The pictures of every split among `files`, named <split>/<number>.png; the label is the number in the labels' file.

    Raises BadSource where a file is damaged or labels do not fit their pictures.
    """
    labels = {_split(LABELS, file): file for file in files if LABELS.search(file.name)}
    seen: dict[str, str] = {}
    for file in files:
        if not IMAGES.search(file.name):
            continue
        split = _split(IMAGES, file)
        if split in seen:
            raise BadSource(f"{file.name} and {seen[split]} are the same split: keep one")
        seen[split] = file.name
        yield from _split_items(listing, file, labels.get(split), split)


def _split(pattern: re.Pattern, file: File) -> str:
    found = pattern.search(file.name)
    return file.name[: found.start()] + found[1] + (found["split"] or "pictures")


def _split_items(listing: Listing, images: File, labels: File | None, split: str) -> Iterator[Item]:
    count, height, width = _shape(listing, images, 3)
    classes = None
    if labels:
        (of,) = _shape(listing, labels, 1)
        if of != count:
            raise BadSource(f"{images.name} has {count:,} pictures and {labels.name} {of:,} labels: one is wrong")
        classes = _read(listing, labels, _head(1), count)
    for number in range(count):
        start = _head(3) + number * height * width
        at = place("grey", file_of(images.place), _packed(images), start, height, width)
        one = File(f"{split}/{number:06d}.png", "", height * width, f"{images.mark}:{number}", at)
        yield item_of(one, {}, images.name, label=str(classes[number]) if classes else "")


def _head(dimensions: int) -> int:
    return 4 + 4 * dimensions


def _packed(file: File) -> str | None:
    return file.mark if file.name.endswith(".gz") else None


def _read(listing: Listing, file: File, start: int, size: int) -> bytes:
    packed, name = _packed(file), file_of(file.place)
    at = place("gz", name, packed, start, size) if packed else place("span", name, start, size)
    with listing.open(file._replace(place=at)) as opened:
        return opened.read()


def _shape(listing: Listing, file: File, dimensions: int) -> tuple[int, ...]:
    """Raises BadSource where the file is no IDX file of this many dimensions, or has another length than it says."""
    packed, name = _packed(file), file_of(file.place)
    length = os.fstat(unpacked(listing.uri, name, packed).fileno()).st_size if packed else file.size
    head = _read(listing, file, 0, min(length, _head(dimensions)))
    if len(head) < _head(dimensions) or head[:4] != bytes([0, 0, _UNSIGNED_BYTES, dimensions]):
        raise BadSource(
            f"{file.name} begins with {head[:4].hex(' ')}: no IDX file of unsigned bytes in {dimensions} dimensions"
        )
    shape = tuple(int.from_bytes(head[at : at + 4]) for at in range(4, len(head), 4))
    if math.prod(shape) == 0 or math.prod(shape[1:]) > MAX_PIXELS:
        raise BadSource(f"{file.name} says that it has {' x '.join(map(str, shape))} numbers: no pictures")
    if math.prod(shape) + len(head) != length:
        raise BadSource(
            f"{file.name} has {length:,} bytes, and {' x '.join(map(str, shape))} numbers need"
            f" {math.prod(shape) + len(head):,}: it is cut off or damaged; copy it again"
        )
    return shape
