"""Bundles past MLflow: the files lie in a folder or bucket of the site's, and what is registered points there.

For weights that a server's proxy would refuse, or that every reader had better not draw through it.  The place is laid out
as a store is, `bundles/DIGEST/`, and what is there never changes.
"""

import shutil
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from diffusion.recipe import Frozen, canonical_json, first_mistake
from diffusion.store.averages import Digest
from diffusion.store.bundle_spec import SPEC_NAME, BundleSpec, bundle_path, read_facts
from diffusion.store.publish import sha256_file
from diffusion.store.storage import Storage, open_storage

POINTER_NAME = "elsewhere.json"


class Pointer(Frozen):
    """elsewhere.json, which lies where a bundle's weights are not."""

    format: Literal[1] = 1
    uri: str
    files: dict[str, Digest]


def send_bundle(place: str, bundle: Path, spec: BundleSpec, digest: str) -> Pointer:
    """Put a verified bundle's files below `place`, a folder or s3://bucket/prefix, where they are not there yet;
    bundle.json last.  May raise what a Storage does."""
    there = open_storage(bundle_uri(place, digest))
    for name in (*spec.weights, SPEC_NAME):
        if there.size(name) != (bundle / name).stat().st_size:
            there.put(name, bundle / name)
    return Pointer(uri=there.uri, files=spec.weights)


def bundle_uri(place: str, digest: str) -> str:
    """Where the bundle of this digest lies below a place."""
    return f"{place.rstrip('/')}/{bundle_path(Path(), digest).as_posix()}"


def point(folder: Path, bundle: Path, pointer: Pointer) -> Path:
    """Write a folder that stands for a bundle: its facts, and where its weights are."""
    folder.mkdir(parents=True)
    shutil.copyfile(bundle / SPEC_NAME, folder / SPEC_NAME)
    (folder / POINTER_NAME).write_bytes(canonical_json(pointer))
    return folder


def bring_bundle(folder: Path, target: Path) -> Path:
    """The folder of a bundle with its weights: `folder` itself where they lie in it, else `target`, a new one, to which
    they are fetched.

    Raises ValueError for a weight that is missing or damaged there, and what a Storage raises.
    """
    if not (folder / POINTER_NAME).is_file():
        return folder
    spec, _ = read_facts(folder, None)
    try:
        pointer = Pointer.model_validate_json((folder / POINTER_NAME).read_bytes())
    except ValidationError as error:
        raise ValueError(f"{folder / POINTER_NAME}: {first_mistake(error)}. Register the model again.") from error
    if pointer.files != spec.weights:
        raise ValueError(f"{folder / POINTER_NAME} is of other weights than {SPEC_NAME}. Register the model again.")
    there = open_storage(pointer.uri)
    target.mkdir(parents=True)
    for name, sha256 in spec.weights.items():
        _fetch(there, name, sha256, target / name)
    shutil.copyfile(folder / SPEC_NAME, target / SPEC_NAME)
    return target


def _fetch(there: Storage, name: str, sha256: str, target: Path) -> None:
    again = (
        "A published bundle never changes: copy the file there again, from the store of the home that registered it."
    )
    try:
        there.fetch(name, target)
    except FileNotFoundError as error:
        raise ValueError(
            f"{there.uri}/{name} is not there, where the registered model's weights are. {again}"
        ) from error
    if (actual := sha256_file(target)) != sha256:
        raise ValueError(f"{there.uri}/{name}: sha256 {actual[:12]}, the registered model says {sha256[:12]}. {again}")
