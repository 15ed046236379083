"""MLflow's registry: bundles as versions of a model, with their lineage, and the aliases `challenger` and `champion`."""

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from diffusion.adapters.mlflow_card import log_card, log_judgement, write
from diffusion.adapters.mlflow_champion import CHAMPION, promote
from diffusion.adapters.mlflow_model import lineage_of, log_bundle
from diffusion.adapters.mlflow_runs import log_evaluation, training_run
from diffusion.adapters.mlflow_tracking import Tracking, connect, reading, registered_models
from diffusion.evaluation.gate.verdict import Verdict
from diffusion.recipe import EvaluateRecipe
from diffusion.store.bundle import publish_bundle, verify_bundle
from diffusion.store.bundle_spec import SPEC_NAME, BundleSpec, bundle_path, read_facts
from diffusion.store.elsewhere import bring_bundle
from diffusion.store.publish import staging
from diffusion.store.refs import EvaluationRef, ModelRef

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel
    from mlflow.entities.model_registry import ModelVersion

CHALLENGER = "challenger"

_MAX_REASONS, _MAX_REASON = 8, 500  # reasons and characters of each, for servers that take 5,000 in a tag


def register(
    tracking: Tracking,
    evaluation: EvaluationRef,
    verdict: Verdict,
    name: str,
    recipe: EvaluateRecipe,
    licence: str | None = None,
) -> ModelRef:
    """Make an evaluated bundle a version of the model `name`, or find the version that it is already.

    The alias `challenger` moves to it, and `champion` as well where the verdict passed.  A version appears whole, after
    all that it needs, so that nobody ever finds half of one.  Safe to repeat: what a process that died left undone is
    done, in the logged model that it began.  Raises Overtaken where the champion is not the one that it was judged against
    any more; `mlflow_gate.settle` then judges again.

    licence: of the data, for the model card; None: nobody said.
    """
    client = connect(tracking)
    spec, digest = verify_bundle(evaluation.bundle_uri, evaluation.bundle_digest)
    evaluation_run = log_evaluation(tracking, evaluation, recipe)
    judged = {
        "evaluation_run": evaluation_run,
        "report_digest": evaluation.digest,
        "verdict": "passed" if verdict.passed else "refused",
        "reasons": json.dumps(_shortened(verdict.reasons), ensure_ascii=False),
    }
    written = write(client, evaluation, evaluation_run, spec, verdict, name, licence)
    log_judgement(client, evaluation_run, verdict, written)
    found = version_of(client, name, digest)
    if found is None:
        run = training_run(client, evaluation) or client.get_run(evaluation_run)
        logged = log_bundle(client, tracking, evaluation, evaluation_run, run, name, spec)
        log_card(client, evaluation, logged.model_id, written)
        tags = lineage_of(evaluation, spec, logged) | judged
        found = _create_version(client, name, logged, tags, written.description)
    else:
        log_card(client, evaluation, found.source.removeprefix("models:/"), written)
    for key, value in judged.items():
        if found.tags.get(key) != value:
            client.set_model_version_tag(name, found.version, key, value)
    if found.description != written.description:
        client.update_model_version(name, found.version, written.description)
    client.set_registered_model_alias(name, CHALLENGER, found.version)
    if verdict.passed:
        promote(client, name, str(found.version), verdict.against)
    return _model_ref(client, name, str(found.version), Path(evaluation.bundle_uri), spec)


def _shortened(reasons: tuple[str, ...]) -> list[str]:
    kept = [reason[:_MAX_REASON] for reason in reasons[:_MAX_REASONS]]
    more = len(reasons) - len(kept)
    return [*kept, f"and {more} more, in verdict.md of the evaluation's run"] if more else kept


def resolve(tracking: Tracking, name: str, which: str, store_root: Path) -> ModelRef:
    """The version of the model `name` that `which`, an alias or a number, means now.  Its bundle lies verified in the
    store: it is fetched if it is not there yet.

    Raises ValueError, naming what there is, for an unknown model, alias or version.
    """
    client = reading(tracking)  # `connect` would make an experiment of a name that is misspelt
    if client is None:
        raise no_model(name, ())
    version, digest = _version_and_digest(client, name, which)
    folder = bundle_path(store_root, digest)
    if not folder.exists():
        _fetch_bundle(tracking, name, version, digest, store_root)
    spec, _ = verify_bundle(folder, digest)
    return _model_ref(client, name, version, folder, spec)


def look_up(tracking: Tracking, name: str, which: str, store_root: Path) -> tuple[str, BundleSpec]:
    """Digest and facts of the bundle that `resolve` would give.  Nothing is made, and of a bundle that the store does not
    have the facts alone are fetched, to be forgotten.  Raises ValueError as `resolve` does.
    """
    client = reading(tracking)
    if client is None:
        raise no_model(name, ())
    version, digest = _version_and_digest(client, name, which)
    folder = bundle_path(store_root, digest)
    if folder.exists():
        return digest, read_facts(folder, digest)[0]
    with tempfile.TemporaryDirectory() as fetched:
        _fetch(tracking, name, version, f"{digest[:16]}/{SPEC_NAME}", fetched)
        return digest, read_facts(next(Path(fetched).rglob(SPEC_NAME)).parent, digest)[0]


def aliases_of(client: "MlflowClient", name: str) -> dict[str, str] | None:
    """Alias -> version of a model; None where there is no such model."""
    from mlflow.exceptions import MlflowException

    try:
        return {alias: str(version) for alias, version in client.get_registered_model(name).aliases.items()}
    except MlflowException as error:
        # the second: that is not a name a model can have
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        return None


def _version_and_digest(client: "MlflowClient", name: str, which: str) -> tuple[str, str]:
    """A version's number and its bundle's digest."""
    version = _version_number(client, name, which)
    digest = client.get_model_version(name, version).tags.get("bundle_digest")
    if digest is None:
        raise ValueError(f"version {version} of {name!r} has no bundle: `diffusion register` did not make it")
    return version, digest


def no_model(name: str, names: Iterable[str]) -> ValueError:
    there = ", ".join(names) or "none"
    return ValueError(f"no model {name!r} is registered; there are: {there}. `diffusion run` makes and registers one.")


def _version_number(client: "MlflowClient", name: str, which: str) -> str:
    aliases = aliases_of(client, name)
    if aliases is None:
        raise no_model(name, (model.name for model in registered_models(client)))
    versions = [str(version.version) for version in client.search_model_versions(f"name = '{name}'")]
    if which in aliases:
        return aliases[which]
    if which in versions:
        return which
    present = ", ".join(f"{alias} (version {version})" for alias, version in sorted(aliases.items())) or "none"
    hint = ""
    if which == CHAMPION:
        hint = (
            f" `diffusion models {name}` says how the gate judged each; one that it let pass becomes champion again by"
            f" `diffusion rollback {name} --to VERSION`."
        )
    raise ValueError(
        f"model {name!r} has no alias or version {which!r}; its aliases are: {present};"
        f" its versions: {', '.join(sorted(versions, key=int))}.{hint}"
    )


def version_of(client: "MlflowClient", name: str, bundle_digest: str) -> "ModelVersion | None":
    """The version whose bundle has this digest, if there is one."""
    found = client.search_model_versions(f"name = '{name}' and tags.bundle_digest = '{bundle_digest}'")
    return min(found, key=lambda version: int(version.version), default=None)


def _create_version(
    client: "MlflowClient", name: str, logged: "LoggedModel", tags: dict[str, str], description: str
) -> "ModelVersion":
    """The version, with all that is known of it from its first moment.  Of two processes that make it, the slower takes its
    own back."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name, description="Draws pictures by class name; each version says how well.")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    made = client.create_model_version(
        name, logged.model_uri, logged.source_run_id, tags, description=description, model_id=logged.model_id
    )
    first = version_of(client, name, tags["bundle_digest"]) or made
    if first.version != made.version:
        client.delete_model_version(name, made.version)
    return first


def _fetch_bundle(tracking: Tracking, name: str, version: str, digest: str, store_root: Path) -> None:
    with staging(Path(store_root) / "bundles") as folder:
        fetched = bring_bundle(_fetch(tracking, name, version, digest[:16], folder), folder / "whole")
        verify_bundle(fetched, digest)
        publish_bundle(fetched, store_root)


def _fetch(tracking: Tracking, name: str, version: str, what: str, folder: str | Path) -> Path:
    """A file or folder of a version's, below `folder`."""
    from mlflow.artifacts import download_artifacts

    uri = f"models:/{name}/{version}/artifacts/{what}"
    return Path(download_artifacts(uri, dst_path=str(folder), tracking_uri=tracking.uri, registry_uri=tracking.uri))


def _model_ref(client: "MlflowClient", name: str, version: str, folder: Path, spec: BundleSpec) -> ModelRef:
    tags = client.get_model_version(name, version).tags
    aliases = sorted(alias for alias, number in (aliases_of(client, name) or {}).items() if number == version)
    return ModelRef(
        uri=str(folder),
        digest=tags["bundle_digest"],
        name=name,
        version=version,
        aliases=tuple(aliases),
        run_digest=spec.run_digest,
        dataset_digest=spec.dataset_digest,
        reasons=tuple(json.loads(tags["reasons"])),
    )
