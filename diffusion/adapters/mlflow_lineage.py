"""What MLflow's registry knows of a bundle by its digest alone."""

from typing import NamedTuple

from diffusion.adapters.mlflow_tracking import Tracking, reading


class Registered(NamedTuple):
    """A version of a model."""

    name: str
    version: str


def registered_as(tracking: Tracking, digest: str) -> Registered | None:
    """The first version, of whatever model, whose bundle has this digest; None where none has.  Nothing is made.

    digest: 64 hex digits.
    """
    client = reading(tracking)
    if client is None:
        return None
    found = client.search_model_versions(f"tags.bundle_digest = '{digest}'")
    known = [Registered(version.name, str(version.version)) for version in found]
    return min(known, key=lambda it: (it.name, int(it.version)), default=None)
