"""What there is in MLflow's registry, for people: models, versions, how the gate judged each, and who was champion when."""

import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from diffusion.adapters.mlflow_champion import WITHDRAWN, Move, journal, roll_back
from diffusion.adapters.mlflow_registry import aliases_of, no_model
from diffusion.adapters.mlflow_tracking import Tracking, reading, registered_models
from diffusion.recipe import Frozen

if TYPE_CHECKING:
    from mlflow import MlflowClient


class Listed(Frozen):
    """One version.  verdict: "passed", "refused", "withdrawn", or "" of one that `diffusion register` did not make."""

    version: str
    aliases: tuple[str, ...]
    verdict: str
    reasons: tuple[str, ...]
    metrics: dict[str, float]  # of its report, by name
    measure: str  # what they are of, in a few words: numbers of another one are not compared
    bundle_digest: str
    made: str  # UTC, ISO 8601


def models(tracking: Tracking) -> list[str]:
    """Names of all registered models, sorted.  Nothing is made."""
    client = reading(tracking)
    return [] if client is None else sorted(model.name for model in registered_models(client))


def versions_of(tracking: Tracking, name: str) -> list[Listed]:
    """The versions of a model, newest first.  Raises ValueError where there is no such model."""
    client, aliases = _known(tracking, name)
    found = client.search_model_versions(f"name = '{name}'")
    return [_listed(client, version, aliases) for version in sorted(found, key=lambda v: -int(v.version))]


def moves_of(tracking: Tracking, name: str) -> list[Move]:
    """Who was made champion by what, oldest first.  Raises ValueError where there is no such model."""
    return journal(_known(tracking, name)[0], name)


def back(tracking: Tracking, name: str, to: str | None) -> Move:
    """Give the alias `champion` back, see `roll_back`.  Raises ValueError where there is no such model as well."""
    return roll_back(_known(tracking, name)[0], name, to)


def _known(tracking: Tracking, name: str) -> tuple["MlflowClient", dict[str, str]]:
    client = reading(tracking)
    aliases = None if client is None else aliases_of(client, name)
    if aliases is None:
        raise no_model(name, models(tracking))
    return client, aliases


def _listed(client: "MlflowClient", version, aliases: dict[str, str]) -> Listed:
    from mlflow.exceptions import MlflowException

    tags, metrics, measure = version.tags, {}, ""
    if run_id := tags.get("evaluation_run"):
        try:
            run = client.get_run(run_id).data
            metrics, measure = dict(run.metrics), _measure(run.params, run.tags)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":  # it was deleted: the version is still one
                raise
    reasons = json.loads(tags.get("reasons", "[]"))
    if WITHDRAWN in tags:
        reasons = [f"`diffusion rollback` withdrew it {tags[WITHDRAWN]}; with --to it comes back", *reasons]
    return Listed(
        version=str(version.version),
        aliases=tuple(sorted(alias for alias, number in aliases.items() if number == str(version.version))),
        verdict="withdrawn" if WITHDRAWN in tags else tags.get("verdict", ""),
        reasons=tuple(reasons),
        metrics={key: value for key, value in metrics.items() if value == value},
        measure=measure,
        bundle_digest=tags.get("bundle_digest", ""),
        made=datetime.fromtimestamp(version.creation_timestamp / 1_000, UTC).isoformat(timespec="seconds"),
    )


def _measure(params: dict[str, str], tags: dict[str, str]) -> str:
    of = f"{params.get('extractor', '?')} at {params.get('extractor_resolution', '?')} px"
    return f"{params.get('samples', '?')} samples, {of}, data {tags.get('dataset_digest', '?')[:8]}"
