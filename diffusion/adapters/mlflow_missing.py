"""Aliases of registered models whose bundle is nowhere any more."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from diffusion.adapters.mlflow_tracking import Tracking, reading, registered_models
from diffusion.store.bundle_spec import SPEC_NAME, bundle_path
from diffusion.store.storage import StorageRefused, StorageUnavailable, open_storage

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion


class Alias(NamedTuple):
    """why: what keeps it from being loaded; None of one that can be.  digest: its bundle's; None of one that we did not
    make."""

    name: str
    alias: str
    version: str
    digest: str | None
    why: str | None


def missing(tracking: Tracking, store: Path) -> Iterator[Alias]:
    """Every alias of every model, with what is wrong with it.  Nothing is fetched but listings.

    store: of this site, which has the bundles that were made or loaded here.  Raises ConnectionError.
    """
    from mlflow.exceptions import MlflowException

    client = reading(tracking)
    if client is None:
        return
    for model in registered_models(client):
        for alias, number in sorted(model.aliases.items()):
            try:
                version = client.get_model_version(model.name, str(number))
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                yield Alias(model.name, alias, str(number), None, "there is no such version any more")
                continue
            digest = version.tags.get("bundle_digest")
            here = digest is None or (bundle_path(store, digest) / SPEC_NAME).is_file()
            yield Alias(model.name, alias, str(number), digest, None if here else _why_not(tracking, version, digest))


def _why_not(tracking: Tracking, version: "ModelVersion", digest: str) -> str | None:
    """What keeps its bundle from being fetched; None: nothing that a listing shows."""
    from mlflow.artifacts import list_artifacts
    from mlflow.exceptions import MlflowException

    place = f"models:/{version.name}/{version.version}/artifacts/{digest[:16]}"
    try:
        names = {file.path.rpartition("/")[2] for file in list_artifacts(place, tracking_uri=tracking.uri)}
    except (MlflowException, OSError) as error:
        return f"its files are not to be had from MLflow ({' '.join(str(error).split())[:200]})"
    if SPEC_NAME not in names:
        return f"its bundle {digest[:16]} is neither in the store here nor among MLflow's files"
    if elsewhere := version.tags.get("weights_uri"):
        try:
            if open_storage(elsewhere).size(SPEC_NAME) is None:
                return f"its weights are not at {elsewhere} any more"
        except (StorageRefused, StorageUnavailable) as error:
            return f"its weights at {elsewhere} are not to be had ({error})"
    return None
