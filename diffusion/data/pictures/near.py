"""Near duplicates: a 64-bit hash of what a picture looks like, and which kept picture is within t bits of it.

The hash is that of pHash, signs of the lowest frequencies of a picture of 32 x 32  [Zauner 2010, section 3.2.1], with
these changes.  48 bits are of the brightness and 8 of each colour difference: colour is all that tells one heart from
another.  The frequencies along one axis alone count too: stripes have no others.  A coefficient gives a 1 if it exceeds
the median (of a colour difference: 0) by more than noise; a picture in which few do has no hash, so blank pages are
near duplicates of nothing.

Two hashes within t bits of each other are within t // 4 bits in at least one of four bands of 16.  So who looks for a
hash's neighbours asks at all values within t // 4 bits of each of its bands  [Norouzi, Punjani and Fleet 2012]; an index
on disk answers, so nothing grows in memory.
"""

import sqlite3
from functools import cache
from itertools import combinations

import numpy as np
from PIL import Image

from diffusion.data.pictures.opencv import opencv

_SIDE = 32
_BRIGHTNESS, _COLOUR = 48, 8  # bits
_NOISE = (4.0, 8.0)  # of either, in an orthonormal transform of grey levels; saving as JPEG moves them by about 1
_FEWEST = 12  # ones of the brightness
_BANDS, _BITS = 4, 16


def perceptual_hash(pixels: np.ndarray) -> int | None:
    """RGB uint8 (H, W, 3), upright and whole -> 64 bits; None where it is too plain to be recognized."""
    cv2 = opencv()
    # whole-number arithmetic, the same on every machine: first by means of whole blocks, which is fast
    small = Image.fromarray(pixels).resize((_SIDE, _SIDE), Image.Resampling.BILINEAR, reducing_gap=2.0)
    planes = cv2.cvtColor(np.asarray(small), cv2.COLOR_RGB2YCrCb).transpose(2, 0, 1)
    basis, order = _lowest()
    brightness, *colours = (basis @ planes @ basis.T).reshape(3, -1)[:, order]
    ones = [brightness - np.median(brightness) > _NOISE[0]]
    if ones[0].sum() < _FEWEST:
        return None
    ones += [colour[:_COLOUR] > _NOISE[1] for colour in colours]
    return int.from_bytes(np.packbits(np.concatenate(ones)).tobytes(), "big")


@cache
def _lowest() -> tuple[np.ndarray, np.ndarray]:
    """The rows of the orthonormal cosine transform that hold the lowest frequencies of a square but 0, and where among
    the products of two rows these are, the lowest first.
    """
    u, v = np.indices((_SIDE, _SIDE)).reshape(2, -1)
    lowest = np.lexsort((u, v, u * u + v * v))[1 : _BRIGHTNESS + 1]
    rows = int(u[lowest].max()) + 1
    angle = np.pi * np.arange(rows)[:, None] * (np.arange(_SIDE) + 0.5) / _SIDE
    basis = np.cos(angle) * np.sqrt(np.where(np.arange(rows)[:, None] == 0, 1, 2) / _SIDE)
    return basis, u[lowest] * rows + v[lowest]


def distance(a: int, b: int) -> int:
    """In how many of their 64 bits two hashes differ."""
    return (a ^ b).bit_count()


def bands(hash: int) -> tuple[int, ...]:
    """The four numbers under which a hash is filed: 16 of its bits, and which."""
    return tuple(i << _BITS | hash >> i * _BITS & 0xFFFF for i in range(_BANDS))


def probes(hash: int, t: int) -> list[int]:
    """The numbers to ask at: whatever is within t bits of `hash` has one of them among its bands."""
    return [band ^ flips for band in bands(hash) for flips in _flips(t // _BANDS)]


@cache
def _flips(radius: int) -> list[int]:
    return [sum(1 << bit for bit in bits) for n in range(radius + 1) for bits in combinations(range(_BITS), n)]


class NearIndex:
    """The hashes of the pictures kept so far, in a table of an SQLite database.  The caller commits."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self.connection = connection
        connection.execute(
            "CREATE TABLE IF NOT EXISTS near_bands (band INTEGER, hash INTEGER, name TEXT,"
            " PRIMARY KEY (band, hash, name)) WITHOUT ROWID"
        )

    def add(self, name: str, hash: int) -> None:
        rows = [(band, hash - 2**63, name) for band in bands(hash)]  # SQLite's integers have a sign
        self.connection.executemany("INSERT OR IGNORE INTO near_bands VALUES (?, ?, ?)", rows)

    def find(self, hash: int, t: int) -> str | None:
        """The first by name of the pictures within t bits; None where there is none."""
        asked = probes(hash, t)
        query = f"SELECT name, hash FROM near_bands WHERE band IN ({','.join('?' * len(asked))})"
        rows = self.connection.execute(query, asked)
        return min((name for name, other in rows if distance(other + 2**63, hash) <= t), default=None)

    def keep(self, name: str, hash: int | None, t: int) -> str | None:
        """None where the picture is kept, and then it is added; or the name of the kept one it nearly repeats.

        Asked in order of name, this is the same whatever the machines and their number: a picture is dropped if it is
        within t bits of an earlier one that was kept.
        """
        if hash is None:
            return None
        near = self.find(hash, t)
        if near is None:
            self.add(name, hash)
        return near
