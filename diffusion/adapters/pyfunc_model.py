"""The registered model as MLflow sees it.  MLflow keeps this file beside the bundle and runs it to load the model:

    mlflow.pyfunc.load_model("models:/demo@champion").predict(pandas.DataFrame({"label": ["flags"], "seed": [7]}))

gives a DataFrame with the columns `png` (bytes, as from the endpoint) and `receipt` (JSON), one row per row asked.  A
model that reads prompts takes a column `prompt` as well, one trained in aspect buckets `size` (WIDTHxHEIGHT).  The
parameters steps, sampler, guidance and, of a model with a guide, guidance_kind hold for all rows.
The package `diffusion` must be installed.
"""

from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import torch
import yaml
from mlflow.exceptions import MlflowException

from diffusion.recipe import canonical_json
from diffusion.serving.engine import Engine
from diffusion.serving.receipt import receipt_of, stamp
from diffusion.serving.request import GenerateRequest, RequestError, parse, resolve
from diffusion.store.bundle import load_bundle
from diffusion.store.elsewhere import bring_bundle
from diffusion.store.publish import temporary

_SLOTS = 4  # pictures drawn at once: few, since proving larger batches takes time at each load


class DiffusionModel(mlflow.pyfunc.PythonModel):
    """Draws one picture for each row: label (a class name, or null for none), prompt (or null) and seed."""

    def load_context(self, context: Any) -> None:
        folder = Path(context.artifacts["bundle"])
        # written by MLflow when a model is loaded by its registered name; a receipt states the same as the endpoint's
        meta = folder.parent.parent / "registered_model_meta"
        registered = yaml.safe_load(meta.read_text()) if meta.is_file() else {}
        self.name = str(registered.get("model_name", "unregistered"))
        self.version = str(registered.get("model_version", "0"))
        with temporary("the model's weights") as place:  # in memory afterwards
            bundle = load_bundle(bring_bundle(folder, place / "bundle"), "cuda" if torch.cuda.is_available() else "cpu")
        self.engine = Engine(bundle, slots=_SLOTS)

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict | None = None) -> pd.DataFrame:
        try:
            requests = [self._request(row, params or {}) for row in model_input.to_dict("records")]
            pictures = self.engine.generate(requests)
        except RequestError as wrong:  # of another kind of error MLflow's server answers with a traceback
            raise MlflowException.invalid_parameter_value(str(wrong)) from wrong
        answers = [self._answer(*pair) for pair in zip(requests, pictures, strict=True)]
        return pd.DataFrame(answers, columns=["png", "receipt"])

    def _request(self, row: dict, params: dict) -> GenerateRequest:
        label, prompt, size = (None if pd.isna(row.get(name)) else row[name] for name in ("label", "prompt", "size"))
        guidance = params.get("guidance")
        kind = params.get("guidance_kind") or self.engine.bundle.spec.sampling.guidance_kind
        nothing = (label, prompt) == (None, None) and kind == "classifier_free"
        return parse(
            GenerateRequest,
            {
                "label": label,
                "prompt": prompt,
                "size": size,
                "seed": int(row["seed"]),
                "steps": params.get("steps"),
                "sampler": params.get("sampler"),
                # a default that strengthens what is asked for says nothing where nothing is
                "guidance": None if guidance is None or nothing else float(guidance),
                "guidance_kind": kind,
            },
        )

    def _answer(self, request: GenerateRequest, pictures: list) -> dict:
        bundle = self.engine.bundle
        receipt = receipt_of(
            pictures[0],
            0,
            resolve(request, bundle.spec),
            bundle.spec,
            bundle_digest=bundle.digest,
            model=self.name,
            version=self.version,
            device=self.engine.device,
        )
        return {"png": stamp(pictures[0], receipt), "receipt": canonical_json(receipt).decode()}


mlflow.models.set_model(DiffusionModel())
