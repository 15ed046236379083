"""Where MLflow is: every function on its runs and models takes a `Tracking`, and asks the client that this connects."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from diffusion.recipe import Frozen
from diffusion.store.publish import fsync_path, staging
from diffusion.store.scrub import scrubbed

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import RegisteredModel

_EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}  # runs come first


class Tracking(Frozen):
    """Where MLflow keeps runs and models."""

    uri: str = Field(description="sqlite:////absolute/path/mlflow.db, or http(s)://host:port of a server")
    artifacts: str | None = Field(None, description="Folder for the files of a new experiment; null: the server's own")
    bundles: str | None = Field(
        None, description="Folder or s3://bucket/prefix for the weights of new versions; null: among MLflow's files"
    )
    experiment: str = "diffusion"


def mlflow_environment() -> dict[str, str]:
    """Environment variables for MLflow: no telemetry, no pickle, quiet, and not minutes until an error is told."""
    return {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_LOGGING_LEVEL": "WARNING",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    }


def connect(tracking: Tracking) -> "MlflowClient":
    """A client, with the database migrated and the experiment made where they are new (seconds, once).

    It also sets this process's MLflow address: creating a model version looks its model up through that one.
    """
    if database := _database(tracking):
        _make_database(database)
    client, made = _asked(tracking)
    if not made:
        from mlflow.exceptions import MlflowException

        location = Path(tracking.artifacts).absolute().as_uri() if tracking.artifacts else None
        try:
            client.create_experiment(tracking.experiment, artifact_location=location, tags=_EXPERIMENT_TAGS)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":  # then another process was faster
                raise
    return client


def reading(tracking: Tracking) -> "MlflowClient | None":
    """A client to ask with, which makes nothing: None where there is no database yet."""
    database = _database(tracking)
    return None if database and not database.exists() else _asked(tracking)[0]


def registered_models(client: "MlflowClient") -> Iterator["RegisteredModel"]:
    """Every registered model: MLflow gives them in pages of 100."""
    token = None
    while True:
        page = client.search_registered_models(page_token=token)
        yield from page
        if not (token := page.token):
            return


def _asked(tracking: Tracking) -> tuple["MlflowClient", bool]:
    """A client that was answered, and whether the experiment is there.  Raises ConnectionError."""
    _prepare()
    import mlflow
    from mlflow.exceptions import MlflowException

    mlflow.set_tracking_uri(tracking.uri)
    mlflow.set_registry_uri(tracking.uri)
    client = mlflow.MlflowClient(tracking.uri, tracking.uri)
    try:
        return client, client.get_experiment_by_name(tracking.experiment) is not None
    except MlflowException as error:
        if error.error_code != "INTERNAL_ERROR":
            raise
        raise ConnectionError(
            scrubbed(
                f"MLflow does not answer at {tracking.uri}: start it there, or set DIFFUSION_MLFLOW to where it is."
                f" It said: {error}"
            )
        ) from error


def _prepare() -> None:
    for name, value in mlflow_environment().items():  # before it is imported
        os.environ.setdefault(name, value)


def _database(tracking: Tracking) -> Path | None:
    """The file, where MLflow is no server."""
    return Path(tracking.uri.removeprefix("sqlite:///")) if tracking.uri.startswith("sqlite:///") else None


def _make_database(path: Path) -> None:
    """Make MLflow's database where there is none, and whole or not at all: it goes on from no half of one."""
    _prepare()
    from mlflow import MlflowClient

    if path.exists():
        return
    with staging(path.parent) as folder:
        made = folder / path.name
        MlflowClient(f"sqlite:///{made}").search_experiments(max_results=1)  # as any first question does
        with suppress(FileExistsError):  # then another process was faster
            os.link(made, path)
    fsync_path(path.parent)
