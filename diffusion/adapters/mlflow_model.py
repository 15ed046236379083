"""What MLflow keeps of a bundle: a pyfunc model of our code file, the bundle, a signature and an example.  No pickle.

Where the site has a place for bundles, the weights go there, and the model holds where they are.
"""

from importlib.metadata import version as installed
from pathlib import Path
from typing import TYPE_CHECKING

from diffusion.adapters.mlflow_runs import log_metrics
from diffusion.adapters.mlflow_tracking import Tracking
from diffusion.store.bundle_spec import WEIGHTS_NAME, BundleSpec
from diffusion.store.codecs import PACKAGES as CODEC_PACKAGES
from diffusion.store.elsewhere import point, send_bundle
from diffusion.store.publish import staging
from diffusion.store.refs import EvaluationRef
from diffusion.store.text_encoders import PACKAGES

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel, Run
    from mlflow.models import ModelSignature

_REQUIREMENTS = ("torch", "numpy", "pillow", "pydantic", "safetensors", "mlflow")
_ELSEWHERE = ("weights_uri", "weights_sha256")  # tags of a model whose weights are past MLflow


def log_bundle(
    client: "MlflowClient",
    tracking: Tracking,
    evaluation: EvaluationRef,
    evaluation_run: str,
    run: "Run",
    name: str,
    spec: BundleSpec,
) -> "LoggedModel":
    """The bundle as a model of the run that trained it, ready; one that a process began and did not finish is finished."""
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus

    same = f"name = '{name}' AND tags.bundle_digest = '{evaluation.bundle_digest}'"
    begun = client.search_logged_models([run.info.experiment_id], same, max_results=1)
    logged = (
        begun[0]
        if begun
        else client.create_logged_model(
            run.info.experiment_id,
            name,
            run.info.run_id,
            lineage_of(evaluation, spec) | {"report_digest": evaluation.digest},
            run.data.params,
            model_type="diffusion",
        )
    )
    if logged.status == LoggedModelStatus.READY:
        return logged
    _send_files(client, tracking, evaluation, run, spec, logged)
    if logged.model_id not in {output.model_id for output in run.outputs.model_outputs}:
        client.log_outputs(run.info.run_id, [LoggedModelOutput(logged.model_id, step=spec.images_seen)])
    log_metrics(client, evaluation_run, evaluation, logged.model_id)
    return client.finalize_logged_model(logged.model_id, "READY")


def lineage_of(evaluation: EvaluationRef, spec: BundleSpec, logged: "LoggedModel | None" = None) -> dict[str, str]:
    """What a bundle comes from, and where its weights are if not in MLflow, as tags."""
    digests = {
        "bundle_digest": evaluation.bundle_digest,
        "run_digest": spec.run_digest,
        "dataset_digest": spec.dataset_digest,
        "recipe_digest": spec.recipe_digest,
    }
    return digests | {key: value for key, value in (logged.tags if logged else {}).items() if key in _ELSEWHERE}


def _send_files(
    client: "MlflowClient",
    tracking: Tracking,
    evaluation: EvaluationRef,
    run: "Run",
    spec: BundleSpec,
    logged: "LoggedModel",
) -> None:
    from mlflow.exceptions import MlflowException
    from requests import HTTPError

    bundle = Path(evaluation.bundle_uri)
    with staging(bundle.parent) as folder:
        if tracking.bundles:
            pointer = send_bundle(tracking.bundles, bundle, spec, evaluation.bundle_digest)
            place = (pointer.uri, spec.weights[WEIGHTS_NAME])
            client.set_logged_model_tags(logged.model_id, dict(zip(_ELSEWHERE, place, strict=True)))
            bundle = point(folder / bundle.name, bundle, pointer)
        save_pyfunc(folder / "model", bundle, spec, logged, run.info.run_id)
        try:
            client.log_model_artifacts(logged.model_id, str(folder / "model"))
        except (HTTPError, MlflowException) as error:
            if "413" not in str(error):
                raise
            size = sum((bundle / name).stat().st_size for name in spec.weights)
            raise ValueError(
                f"{tracking.uri} does not take the weights, {size / 2**20:,.1f} MiB ({error}): set DIFFUSION_BUNDLES to"
                f" a folder or s3://bucket/prefix that all machines reach, and they go there, past it"
            ) from error


def save_pyfunc(folder: Path, bundle: Path, spec: BundleSpec, logged: "LoggedModel", run_id: str) -> None:
    """Write the MLflow model: our code file, the bundle, signature and example.  No object is pickled."""
    import pandas as pd
    from mlflow.models import Model
    from mlflow.pyfunc import save_model

    requirements = _REQUIREMENTS + (PACKAGES[spec.text.name] if spec.text else ())
    requirements += CODEC_PACKAGES[spec.codec.name] if spec.codec else ()
    save_model(
        path=str(folder),
        python_model=str(Path(__file__).with_name("pyfunc_model.py")),
        artifacts={"bundle": str(bundle)},
        signature=signature_of(spec),
        input_example=pd.DataFrame({"label": [spec.classes[0]], "seed": [0]}),
        # without the build's own label, as in 2.13.0+cpu, which the package index does not have
        pip_requirements=[f"{name}=={installed(name).split('+')[0]}" for name in requirements],
        mlflow_model=Model(
            artifact_path=logged.artifact_location, model_uuid=logged.model_id, model_id=logged.model_id, run_id=run_id
        ),
    )


def signature_of(spec: BundleSpec) -> "ModelSignature":
    """The columns and parameters that the model takes, and what it gives."""
    from mlflow.models import ModelSignature
    from mlflow.types.schema import ColSpec, ParamSchema, ParamSpec, Schema

    sampling = spec.sampling
    kind = [ParamSpec("guidance_kind", "string", sampling.guidance_kind)] if spec.guide else []
    columns = ["label", *(["prompt"] if spec.text else []), *(["size"] if spec.sizes else [])]
    asked = [ColSpec("string", name, required=False) for name in columns]
    return ModelSignature(
        Schema([*asked, ColSpec("long", "seed")]),
        Schema([ColSpec("binary", "png"), ColSpec("string", "receipt")]),
        ParamSchema(
            [
                ParamSpec("steps", "long", sampling.steps),
                ParamSpec("sampler", "string", sampling.sampler),
                ParamSpec("guidance", "double", sampling.guidance),
                *kind,
            ]
        ),
    )
