"""What MLflow keeps of a bundle: a pyfunc model of our code file, the bundle, a signature and an example.  No pickle."""

from importlib.metadata import version as installed
from pathlib import Path
from typing import TYPE_CHECKING

from diffusion.store.bundle import BundleSpec
from diffusion.store.codecs import PACKAGES as CODEC_PACKAGES
from diffusion.store.text_encoders import PACKAGES

if TYPE_CHECKING:
    from mlflow.entities import LoggedModel
    from mlflow.models import ModelSignature

_REQUIREMENTS = ("torch", "numpy", "pillow", "pydantic", "safetensors", "mlflow")


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
