"""The training pictures nearest to a picture, in the features that evaluations compare pictures in."""

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors
import torch

from diffusion.data.images import encode_png, grid
from diffusion.data.reader import ShardReader
from diffusion.evaluation import plan, reference
from diffusion.evaluation.extractors.features import Extractor, extractor, find_weights
from diffusion.evaluation.reference import LIMIT, ReferenceIdentity
from diffusion.recipe import EvaluateRecipe
from diffusion.threads import one_thread

_SIDE = 128  # pixels of the side of a picture that is shown, at least
_CHUNK = 256  # pictures of which features are computed at a time


class Near(NamedTuple):
    """A training picture, by its number in the split, and its distance in feature space."""

    picture: int
    distance: float


class Searched(NamedTuple):
    """Among which pictures was looked: `compared` of them, evenly spaced, in the features of `extractor`."""

    near: tuple[Near, ...]  # the nearest first
    compared: int
    extractor: str
    typical: float  # median distance of the compared pictures


def known(store: Path, dataset_digest: str) -> Iterator[ReferenceIdentity]:
    """Identities of the features of this dataset's training pictures that are kept in the store, most pictures first."""
    found = []
    for path in sorted((Path(store) / "features").glob("*.safetensors")):
        try:
            with safetensors.safe_open(path, framework="numpy") as file:
                facts = json.loads((file.metadata() or {})["facts"])
            identity = ReferenceIdentity.model_validate_json(json.dumps(facts["identity"]))
        except (safetensors.SafetensorError, ValueError, LookupError, TypeError):
            continue  # `diffusion verify` tells of it
        if identity.dataset_digest == dataset_digest and identity.split == "train":
            found.append(identity)
    yield from sorted(found, key=lambda identity: -identity.pictures)


def search(
    picture: np.ndarray,
    reader: ShardReader,
    store: Path,
    *,
    count: int,
    progress: Callable[[int, int], None] | None = None,
) -> Searched:
    """The `count` training pictures nearest to `picture`, uint8 (H, W, 3), by Euclidean distance of features.

    reader: of the training split.  Features that an evaluation has kept are used, if its extractor is to be had here; else
    they are computed, as an evaluation does by default, and kept for it.  progress(done, total): pictures computed.
    """
    with one_thread():
        features, extract, identity = _features(reader, store, progress)
        own = extract(torch.from_numpy(np.ascontiguousarray(picture[None]))).double()
        distances = (torch.from_numpy(features).double() - own).square().sum(1).sqrt()
    places = plan.evenly(len(reader), identity.pictures)
    best = torch.argsort(distances, stable=True)[:count].tolist()
    near = tuple(Near(places[i], float(distances[i])) for i in best)
    return Searched(near, len(places), identity.extractor.name, float(distances.median()))


def _features(
    reader: ShardReader, store: Path, progress: Callable[[int, int], None] | None
) -> tuple[np.ndarray, Extractor, ReferenceIdentity]:
    for identity in known(store, reader.manifest.digest):
        wanted = identity.extractor
        try:
            extract = extractor(wanted.name, resolution=wanted.resolution, weights=find_weights(wanted.name))
            features = reference.recall(store, identity)
        except ValueError:
            continue  # a site's own extractor that is not here, or a damaged file
        if features is not None and extract.identity == wanted:
            return features, extract, identity
    recipe = EvaluateRecipe()
    extract = extractor(recipe.extractor, resolution=recipe.extractor_resolution)
    compared = np.array(plan.evenly(len(reader), LIMIT))
    parts: list[np.ndarray | None] = [None] * len(compared)
    done = 0
    for places in reader.by_size(compared):
        for start in range(0, len(places), _CHUNK):
            chunk = places[start : start + _CHUNK]
            found = extract(torch.from_numpy(reader.gather(compared[chunk]).images)).numpy()
            for place, row in zip(chunk.tolist(), found, strict=True):
                parts[place] = row
            done += len(chunk)
            if progress:
                progress(done, len(compared))
    features = np.stack(parts)
    identity = ReferenceIdentity(
        dataset_digest=reader.manifest.digest,
        pictures=len(compared),
        extractor=extract.identity,
        torch=torch.__version__,
        device="cpu",
    )
    with suppress(OSError):  # where there is no room or no right to write, they are computed again the next time
        reference.remember(store, identity, features)
    return features, extract, identity


def side_by_side(picture: np.ndarray, reader: ShardReader, near: tuple[Near, ...]) -> bytes:
    """A PNG: the picture, and the training pictures, the nearest first, each in whole pixels large enough to be seen."""
    pictures = [picture, *(reader.read(it.picture).image for it in near)]
    times = max(1, -(-_SIDE // max(picture.shape[0] for picture in pictures)))
    return encode_png(grid([it.repeat(times, 0).repeat(times, 1) for it in pictures], len(pictures), gap=4))
