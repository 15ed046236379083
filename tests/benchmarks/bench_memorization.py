"""How often the embedded emoji are taken for copies: `python -m tests.benchmarks.bench_memorization` (about five minutes).

Every round divides them anew, at random, into held-out pictures, honest ones that stand for drawn ones, and training
pictures.  Honest rounds say how often a model that repeats nothing is accused, which is stated to be 2.5 % at most; in the
others a share of the drawn pictures are training pictures, as they are or changed.  Accused is whose interval lies above 0.
"""

import argparse
import io
import json
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import diffusion.data
from diffusion.data.images import decode
from diffusion.evaluation.extractors.features import extractor
from diffusion.evaluation.metrics.memorization import Looks, copies, nearest, shrink
from diffusion.threads import one_thread
from tests.changed_pictures import CHANGED

ARCHIVE = Path(diffusion.data.__file__).parent / "embedded" / "noto-emoji-64.zip"
HELD_OUT, DRAWN = 207, 512  # as in the demo


def emoji(side: int = 32) -> Tensor:
    """All of them, uint8 (N, side, side, 3)."""
    with zipfile.ZipFile(ARCHIVE) as source:
        rows = [json.loads(line) for line in io.TextIOWrapper(source.open("metadata.jsonl"), "utf-8")]
        files = [source.read(row["file_name"]) for row in rows]
    pictures = [decode(data, resolution=side, background="#ffffff") for data in files]
    return torch.from_numpy(np.stack(pictures))


CHANGES = CHANGED | {
    "moved by 1 pixel": lambda pictures: pictures.roll(1, dims=2),
}
PLANTED = [("as they are", 0.03), ("as they are", 0.1), ("mirrored", 0.1), ("JPEG of quality 75", 0.1)]
PLANTED += [("JPEG of quality 75", 0.25), ("noise of 8 levels", 0.1), ("moved by 1 pixel", 0.25)]


def looks(pictures: Tensor) -> Looks:
    return Looks(extractor("efficientnet-lite0", resolution=96)(pictures), shrink(pictures))


def rounds(count: int, own: Looks, changed: Looks, share: float, draw: int) -> tuple[int, float, float]:
    """How many are accused, the mean share found, and how often the interval holds the true share."""
    accused, found, held = 0, [], 0
    for seed in range(count):
        order = torch.from_numpy(np.random.default_rng(seed).permutation(len(own.small)))
        control, honest, training = order.split([HELD_OUT, draw, len(order) - HELD_OUT - draw])
        copied = round(share * draw)
        known = _of(own, training)
        parts = _of(own, honest[copied:]), _of(changed, training[:copied])
        drawn = Looks(*(torch.cat(pair) for pair in zip(*((part.features, part.small) for part in parts), strict=True)))
        result = copies(nearest(drawn, known), nearest(_of(own, control), known), training=len(known.features))
        accused += result.low > 0
        found.append(result.share)
        held += result.low <= copied / draw <= result.high
    return accused, float(np.mean(found)), held / count


def _of(looks: Looks, chosen: Tensor) -> Looks:
    return Looks(looks.features[chosen], looks.small[chosen])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--honest", type=int, default=200, help="honest rounds")
    parser.add_argument("--planted", type=int, default=40, help="rounds of each kind of copy")
    options = parser.parse_args()
    start = time.perf_counter()
    with one_thread():
        pictures = emoji()
        seen = {name: looks(change(pictures)) for name, change in CHANGES.items()}
        own = seen["as they are"]
        print("| copies | their share | accused | share found, mean | interval holds it |")
        print("|---|---|---|---|---|", flush=True)
        for name, share in [("none", 0.0), *PLANTED]:
            count = options.planted if share else options.honest
            accused, found, held = rounds(count, own, seen.get(name, own), share, DRAWN)
            print(f"| {name} | {share:.0%} | {accused} of {count} | {found:.1%} | {held:.0%} |", flush=True)
    print(f"{len(pictures):,} emoji, {HELD_OUT} held out, {DRAWN} drawn; {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
