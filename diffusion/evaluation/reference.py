"""Features of the real pictures, kept by identity: computed once for a dataset, an extractor and a torch."""

import hashlib
from pathlib import Path
from typing import Literal

import numpy as np
import safetensors
import safetensors.numpy
import torch

from diffusion.evaluation.features import ExtractorIdentity
from diffusion.evaluation.gathered import Setup
from diffusion.recipe import Frozen, canonical_json, digest_of
from diffusion.store.publish import write_atomic

LIMIT = 50_000  # pictures of a larger training split, evenly spaced


class ReferenceIdentity(Frozen):
    """Everything these features depend on: a changed one has another digest, so a stale file is never found."""

    dataset_digest: str
    split: Literal["train"] = "train"
    pictures: int
    extractor: ExtractorIdentity
    torch: str
    device: str


def reference_for(setup: Setup, pictures: int) -> ReferenceIdentity:
    """Of so many training pictures, as workers of this setup extract their features."""
    return ReferenceIdentity(
        dataset_digest=setup.dataset_digest,
        pictures=pictures,
        extractor=setup.extractor,
        torch=torch.__version__,
        device=setup.device,
    )


def path_of(store_root: Path, identity: ReferenceIdentity) -> Path:
    """Where the features of this identity are kept."""
    return Path(store_root) / "features" / f"{digest_of(identity)}.safetensors"


def remember(store_root: Path, identity: ReferenceIdentity, features: np.ndarray) -> Path:
    """Keep features float32 (pictures, D), whole or not at all."""
    path = path_of(store_root, identity)
    facts = {"facts": _facts(identity, features)}  # one key: the order of several would differ from time to time
    write_atomic(path, safetensors.numpy.save({"features": features}, metadata=facts))
    return path


def recall(store_root: Path, identity: ReferenceIdentity) -> np.ndarray | None:
    """The features float32 (pictures, D), or None where they were never computed.  Raises ValueError for a damaged file."""
    path = path_of(store_root, identity)
    if not path.exists():
        return None
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            facts, features = (file.metadata() or {}).get("facts"), file.get_tensor("features")
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): delete this file, it will be computed again") from error
    if facts != _facts(identity, features):
        raise ValueError(f"{path} is not what its name says: delete this file, it will be computed again")
    return features


def _facts(identity: ReferenceIdentity, features: np.ndarray) -> str:
    digest = hashlib.sha256(f"{features.dtype}{features.shape}".encode() + features.tobytes()).hexdigest()
    return canonical_json({"identity": identity.model_dump(mode="json"), "sha256": digest}).decode()
