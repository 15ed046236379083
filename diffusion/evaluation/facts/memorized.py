"""Memorization in the report: the share of copies among the drawn pictures, and the pairs that are nearest."""

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from diffusion.data.reader import ShardReader
from diffusion.evaluation.facts.neighbours import at_most
from diffusion.evaluation.gathered import Gathered
from diffusion.evaluation.identity import SampleIdentity, sample_identity
from diffusion.evaluation.metrics.intervals import digits
from diffusion.evaluation.metrics.memorization import (
    NEIGHBOURS,
    QUANTILE,
    SIDE,
    THUMBNAIL,
    Copies,
    Looks,
    copies,
    nearest,
    shrink,
)
from diffusion.evaluation.metrics.pairs import TILE
from diffusion.recipe import Frozen


class MemorizationIdentity(Frozen):
    """What must be equal for two shares of copies to be compared: everything but the model."""

    sample: SampleIdentity
    held_out_pictures: int
    pixels: int = SIDE  # side of the small copies
    neighbours: int = NEIGHBOURS
    quantile: float = QUANTILE


class Pair(Frozen):
    """A drawn picture and the training picture that it is nearest to."""

    picture: int  # which of the measured pictures
    label: str
    seed: int  # with the label, what draws it again
    training: int  # which picture of the training split
    key: str  # of that
    score: float  # relative distance in medians of the held-out pictures'
    near: bool  # nearer than all but a few of the held-out pictures are


class Memorization(Frozen):
    """The share of copies among drawn pictures, in excess of what held-out pictures give.  See `memorization.copies`."""

    identity: MemorizationIdentity
    share: float
    confidence: float
    low: float
    high: float
    near: int  # drawn pictures nearer than the threshold
    counted: int  # of them, for share and low: see `memorization.copies`
    expected: float  # of a model that repeats nothing, in the mean
    threshold: float  # a score
    pairs: tuple[Pair, ...]  # the nearest first

    def metrics(self) -> dict[str, float]:
        """Name -> value, for a tracker."""
        return {"memorized": self.share, "memorized_low": self.low, "memorized_high": self.high}


def memorization_of(gathered: Gathered) -> Memorization | None:
    """None where nothing is held out, or the model gave no pictures."""
    if gathered.control is None or gathered.drawn is None:
        return None
    training = Looks(gathered.real, gathered.real_small)
    drawn, control = at_most(gathered.drawn), at_most(gathered.control.features)
    small = torch.cat([shrink(gathered.thumbnails[some]) for some in drawn.places.split(TILE)])
    honest = Looks(control, gathered.control.small[control.places])
    found = copies(nearest(Looks(drawn, small), training), nearest(honest, training), training=len(gathered.real))
    sample = sample_identity(gathered, "memorization/1", samples=len(drawn), reference_pictures=len(gathered.real))
    return Memorization(
        identity=MemorizationIdentity(sample=sample, held_out_pictures=len(control)),
        share=digits(found.share),
        confidence=found.confidence,
        low=digits(found.low),
        high=digits(found.high),
        near=found.near,
        counted=found.counted,
        expected=digits(len(found.score) * found.rank / (len(control) + 1)),
        threshold=digits(found.threshold),
        pairs=_pairs(gathered, found, drawn.places.tolist()),
    )


def _pairs(gathered: Gathered, found: Copies, pictures: list[int]) -> tuple[Pair, ...]:
    """pictures: which of the measured ones were compared."""
    measured, reader = [draw for draw in gathered.draws if draw.measured], _training(gathered)
    chosen = found.score.argsort(kind="stable")[: gathered.recipe.nearest_pairs].tolist()
    places = [gathered.compared[found.index[i]] for i in chosen]
    return tuple(
        Pair(
            picture=pictures[i],
            label=gathered.manifest.classes[measured[pictures[i]].label],
            seed=measured[pictures[i]].seed,
            training=place,
            key=reader.read(place).key,
            score=digits(found.score[i]),
            near=bool(found.score[i] < found.threshold),
        )
        for i, place in zip(chosen, places, strict=True)
    )


def nearest_picture(gathered: Gathered, found: Memorization | None) -> dict[str, np.ndarray]:
    """{"nearest": the pairs side by side, drawn and training picture, with their scores}, or {} of no pairs."""
    if found is None or not found.pairs:
        return {}
    drawn = gathered.thumbnails[[pair.picture for pair in found.pairs]].numpy()
    reader = _training(gathered)
    training = [shrink(torch.from_numpy(reader.read(pair.training).image[None]), THUMBNAIL) for pair in found.pairs]
    return {"nearest": side_by_side(drawn, torch.cat(training).numpy(), found.pairs)}


def side_by_side(drawn: np.ndarray, training: np.ndarray, pairs: tuple[Pair, ...]) -> np.ndarray:
    """Pictures uint8 (N, THUMBNAIL, THUMBNAIL, 3), thrice as large, four pairs in a row.  Returns uint8 (H, W, 3)."""
    side, gap, line, columns = 3 * THUMBNAIL, 12, 18, 4
    rows = -(-len(pairs) // columns)
    width, height = 2 * side + 2 + gap, side + line + gap
    canvas = Image.new("RGB", (gap + min(columns, len(pairs)) * width, gap + line + rows * height), "#ffffff")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=12)
    draw.text((gap, gap // 2), "left drawn, right the nearest training picture", "#202020", font)
    for i, pair in enumerate(pairs):
        row, column = divmod(i, columns)
        left, top = gap + column * width, gap + line + row * height
        for n, picture in enumerate((drawn[i], training[i])):
            large = Image.fromarray(picture).resize((side, side), Image.Resampling.NEAREST)
            canvas.paste(large, (left + n * (side + 2), top))
        said = f"{pair.score:.3g}{' near' if pair.near else ''}: {pair.label}"
        while font.getlength(said) > 2 * side:
            said = said[:-2] + "…"
        draw.text((left, top + side + 2), said, "#c04030" if pair.near else "#202020", font)
    return np.array(canvas)


def _training(gathered: Gathered) -> ShardReader:
    setup = gathered.setup
    return ShardReader(setup.dataset_uri, digest=setup.dataset_digest, cache_mib=0, captions=False)
