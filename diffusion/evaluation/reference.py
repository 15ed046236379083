"""Features and small copies of the real pictures, kept by identity: computed once for dataset, extractor and torch."""

import hashlib
import json
from pathlib import Path

import numpy as np
import safetensors
import torch

from diffusion.data.manifest import Split
from diffusion.evaluation.extractors.features import ExtractorIdentity
from diffusion.evaluation.gathered import Setup
from diffusion.evaluation.metrics.memorization import SIDE, Looks
from diffusion.recipe import Frozen, canonical_json, digest_of
from diffusion.store.publish import replacing, room_in

LIMIT = 50_000  # pictures of a larger training split, evenly spaced
PIXELS = ExtractorIdentity(name="pixels", digest="none", resolution=SIDE, resize="area", precision="uint8")
_TYPES = {"float32": "F32", "uint8": "U8"}  # as safetensors calls them


class ReferenceIdentity(Frozen):
    """Everything these features depend on: a changed one has another digest, so a stale file is never found."""

    dataset_digest: str
    split: Split = "train"
    pictures: int
    extractor: ExtractorIdentity
    torch: str
    device: str


def reference_for(setup: Setup, pictures: int, split: Split = "train") -> ReferenceIdentity:
    """Of so many pictures of a split, as workers of this setup extract their features."""
    return ReferenceIdentity(
        dataset_digest=setup.dataset_digest,
        split=split,
        pictures=pictures,
        extractor=setup.extractor,
        torch=torch.__version__,
        device=setup.device,
    )


def recall_looks(store_root: Path, setup: Setup, split: Split, pictures: int) -> Looks | None:
    """What evaluations compare so many pictures of a split by, or None where it is not known as a whole."""
    identity = reference_for(setup, pictures, split)
    features, small = (recall(store_root, one) for one in (identity, _of_pixels(identity)))
    if features is None or small is None:
        return None
    return Looks(torch.from_numpy(features), torch.from_numpy(small))


def remember_looks(store_root: Path, setup: Setup, split: Split, looks: Looks) -> None:
    """Keep it: the features, and the small copies as if another extractor gave them."""
    identity = reference_for(setup, len(looks.features), split)
    remember(store_root, identity, looks.features.numpy())
    remember(store_root, _of_pixels(identity), looks.small.numpy())


def _of_pixels(identity: ReferenceIdentity) -> ReferenceIdentity:
    return identity.model_copy(update={"extractor": PIXELS})


def path_of(store_root: Path, identity: ReferenceIdentity) -> Path:
    """Where the features of this identity are kept."""
    return Path(store_root) / "features" / f"{digest_of(identity)}.safetensors"


def remember(store_root: Path, identity: ReferenceIdentity, features: np.ndarray) -> Path:
    """Keep features (pictures, ...), whole or not at all."""
    path = path_of(store_root, identity)
    features = np.ascontiguousarray(features)
    facts = {"facts": _facts(identity, features)}  # one key: the order of several would differ from time to time
    entry = {"dtype": _TYPES[features.dtype.name], "shape": list(features.shape), "data_offsets": [0, features.nbytes]}
    header = json.dumps({"__metadata__": facts, "features": entry}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    # by hand, for the library would hold a copy of all features
    with room_in(path.parent, "the features of pictures"), replacing(path) as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.write(features.data)
    return path


def recall(store_root: Path, identity: ReferenceIdentity) -> np.ndarray | None:
    """The features (pictures, ...), read from the file as they are used, or None where they were never computed.  Raises
    ValueError for a damaged file."""
    path = path_of(store_root, identity)
    if not path.exists():
        return None
    try:
        with safetensors.safe_open(path, framework="pt") as file:  # of torch, whose tensor is the file
            facts, features = (file.metadata() or {}).get("facts"), file.get_tensor("features").numpy()
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): delete this file, it will be computed again") from error
    if facts != _facts(identity, features):
        raise ValueError(f"{path} is not what its name says: delete this file, it will be computed again")
    return features


def _facts(identity: ReferenceIdentity, features: np.ndarray) -> str:
    digest = hashlib.sha256(f"{features.dtype}{features.shape}".encode())
    digest.update(features.data)
    facts = {"identity": identity.model_dump(mode="json"), "sha256": digest.hexdigest()}
    return canonical_json(facts).decode()
