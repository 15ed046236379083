"""Datasets whose sidecars a test makes and spoils."""

from pathlib import Path

from diffusion.data import manifest
from diffusion.store.refs import DatasetRef


def in_a_root_of_its_own(dataset: DatasetRef, folder: Path) -> DatasetRef:
    """A copy of the dataset, with `folder` as its data root."""
    root = manifest.root_of(dataset.uri)
    for found in root.walk():
        target = folder / found.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(root.read(found.name))
    return dataset.model_copy(update={"uri": str(folder / Path(dataset.uri).relative_to(root.uri))})


def sidecar_files(dataset: DatasetRef) -> dict[str, bytes]:
    """The bytes of every sidecar in the dataset's data root, by name."""
    root = manifest.root_of(dataset.uri)
    return {found.name: root.read(found.name) for found in root.walk("precomputed")}
