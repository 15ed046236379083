"""What a receipt names, found by its digest.  A receipt may come from anywhere, so nothing else in it is followed."""

from pathlib import Path

from diffusion.adapters.mlflow_lineage import registered_as
from diffusion.adapters.mlflow_registry import resolve
from diffusion.data.sources import MAX_FILE_BYTES
from diffusion.serving.receipt import Opened, opened
from diffusion.store.bundle import verify_bundle
from diffusion.store.bundle_spec import bundle_path
from flows.site import Site


def read_picture(path: Path) -> tuple[bytes, Opened]:
    """A PNG or WebP with a receipt: its bytes, and what is in it.  Raises ValueError saying what is wrong."""
    if not path.is_file():
        raise ValueError(f"{path} is no file: give a PNG or WebP that `diffusion sample` or the endpoint has drawn")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ValueError(f"{path} has more than {MAX_FILE_BYTES:,} bytes: no picture drawn here has")
    data = path.read_bytes()
    try:
        return data, opened(data)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def bundle_of(site: Site, digest: str) -> Path:
    """The folder of the bundle of this digest, verified: in the store, fetched from the registry where it is not there.

    Raises ValueError saying where it was looked for.
    """
    folder = bundle_path(site.store, digest)
    if folder.exists():
        verify_bundle(folder, digest)
        return folder
    # of what a model is called the search needs nothing
    if (found := registered_as(site.tracking("lineage"), digest)) is None:
        raise ValueError(
            f"the bundle {digest[:16]} is neither in {site.store} nor in the registry {site.mlflow_uri}: name the home of"
            f" the model with --home, or its registry with DIFFUSION_MLFLOW"
        )
    return Path(resolve(site.tracking(found.name), found.name, found.version, site.store).uri)
