"""A folder of pictures some of which cannot or should not be used, each for a known reason."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from diffusion.recipe import ShardRecipe

RECIPE = ShardRecipe(resolution=32, shard_size=16, holdout=0.2, max_rejected=0.5, min_side=30, max_aspect=3.0)
REASONS = {
    "cats/cut.png": "truncated",
    "cats/empty.png": "empty",
    "cats/long.png": "too elongated",
    "cats/twin.png": "duplicate",
    "dogs/text.jpg": "not a picture",
    "dogs/tiny.png": "too small",
    "dogs/tiny2.png": "too small",
}
GOOD = 24


def picture(seed: int, width: int = 40, height: int = 40) -> bytes:
    """A PNG of noise."""
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)).save(out, "PNG")
    return out.getvalue()


def fill(folder: Path) -> Path:
    """GOOD pictures of two classes, and those of REASONS."""
    for label in ("cats", "dogs"):
        (folder / label).mkdir(parents=True)
    for n in range(GOOD):
        (folder / ("cats", "dogs")[n % 2] / f"{n:02d}.png").write_bytes(picture(n))
    (folder / "cats" / "cut.png").write_bytes(picture(90)[:900])
    (folder / "cats" / "empty.png").write_bytes(b"")
    (folder / "cats" / "long.png").write_bytes(picture(91, 200, 40))
    (folder / "cats" / "twin.png").write_bytes(picture(2))
    (folder / "dogs" / "text.jpg").write_text("no picture")
    (folder / "dogs" / "tiny.png").write_bytes(picture(92, 20, 20))
    (folder / "dogs" / "tiny2.png").write_bytes(picture(93, 21, 20))
    return folder
