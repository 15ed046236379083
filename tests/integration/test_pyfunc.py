"""MLflow's own way of loading and drawing: the bytes of the endpoint, and its refusals."""

import base64
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from mlflow.exceptions import MlflowException

from diffusion.adapters.mlflow_model import signature_of
from diffusion.adapters.mlflow_tracking import Tracking, connect, mlflow_environment
from diffusion.data.images import decode_png
from diffusion.presets import PRESETS
from diffusion.serving.receipt import read_receipt
from diffusion.serving.request import GenerateRequest
from diffusion.store.refs import ModelRef
from diffusion.store.text_encoders import text_encoder
from tests.mlflow_server import answers
from tests.ports import free_port
from tests.random_bundle import published_model, random_spec, reading_bundle, reading_spec, shaped_bundle
from tests.registered_run import endpoint_png


@pytest.fixture(scope="module")
def loaded(champion: ModelRef, tracking: Tracking, tmp_path_factory: pytest.TempPathFactory):
    import mlflow

    connect(tracking)
    assert os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] == "false"
    return mlflow.pyfunc.load_model("models:/smoke@champion")


def test_predict_gives_the_bytes_of_the_endpoint(loaded, champion):
    answer = loaded.predict(
        pd.DataFrame({"label": ["flags", "food-drink", None], "seed": [7, 8, 9]}),
        params={"steps": 4, "sampler": "ddim", "guidance": 3.0},
    )
    assert list(answer.columns) == ["png", "receipt"]
    for png, label, seed in zip(answer["png"], ("flags", "food-drink", None), (7, 8, 9), strict=True):
        guidance = None if label is None else 3.0
        request = GenerateRequest(label=label, seed=seed, steps=4, sampler="ddim", guidance=guidance)
        assert png == endpoint_png(champion, request)


def test_by_default_the_model_decides_how_to_draw(loaded, champion):
    answer = loaded.predict(pd.DataFrame({"label": ["flags"], "seed": [7]}))
    assert answer["png"][0] == endpoint_png(champion, GenerateRequest(label="flags", seed=7))
    receipt = read_receipt(answer["png"][0])
    assert (receipt.model, receipt.version, receipt.bundle_digest) == ("smoke", "1", champion.digest)
    sampling = PRESETS["smoke"]().evaluate.sampling
    assert (receipt.steps, receipt.sampler, receipt.guidance) == (sampling.steps, sampling.sampler, sampling.guidance)
    assert json.loads(answer["receipt"][0]) == receipt.model_dump(mode="json")
    assert decode_png(answer["png"][0]).shape == (32, 32, 3)


def test_a_picture_depends_on_its_own_row_only(loaded):
    rows = pd.DataFrame({"label": ["flags", "food-drink", "flags"], "seed": [1, 1, 2]})
    together = list(loaded.predict(rows)["png"])
    assert together == [loaded.predict(rows.iloc[[i]])["png"].iloc[0] for i in range(3)]
    assert len(set(together)) == 3


def test_no_rows_give_no_pictures(loaded):
    answer = loaded.predict(pd.DataFrame({"label": pd.Series([], dtype=str), "seed": pd.Series([], dtype="int64")}))
    assert list(answer.columns) == ["png", "receipt"]
    assert len(answer) == 0


@pytest.mark.parametrize(
    ("row", "params", "message"),
    [
        ({"label": "flag", "seed": 1}, {}, "did you mean 'flags'"),
        ({"label": "flags", "seed": -1}, {}, "seed=-1"),
        ({"label": "flags", "seed": 1}, {"steps": 1}, "steps=1"),
        ({"label": "flags", "seed": 1}, {"sampler": "euler"}, "heun, ddim, dpmpp_2m, unipc"),
    ],
)
def test_a_wrong_request_is_refused_as_the_endpoint_refuses_it(loaded, row, params, message):
    with pytest.raises(MlflowException, match=message) as refusal:
        loaded.predict(pd.DataFrame([row]), params=params)
    assert refusal.value.get_http_status_code() == 400


def test_a_fresh_process_loads_it_by_address_alone(champion, tracking, tmp_path):
    """As the README says: nothing but the address of MLflow, and nothing appears in the working folder."""
    code = (
        "import mlflow, pandas\n"
        f"model = mlflow.pyfunc.load_model('models:/{champion.name}@champion')\n"
        "png = model.predict(pandas.DataFrame({'label': ['flags'], 'seed': [7]}))['png'][0]\n"
        "import sys; sys.stdout.buffer.write(png)\n"
    )
    environment = os.environ | mlflow_environment() | {"MLFLOW_TRACKING_URI": tracking.uri}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout == endpoint_png(champion, GenerateRequest(label="flags", seed=7))
    assert list(tmp_path.iterdir()) == []


def test_the_registrys_model_takes_prompts_where_they_are_read(tmp_path):
    from diffusion.adapters.pyfunc_model import DiffusionModel

    assert signature_of(reading_spec()).inputs.input_names() == ["label", "prompt", "seed"]
    assert signature_of(random_spec("bf16", "4" * 64, 1)).inputs.input_names() == ["label", "seed"]
    published = published_model(tmp_path, bundle=reading_bundle(encoder=text_encoder("minilm", tokens=20))).uri
    model = DiffusionModel()
    model.load_context(SimpleNamespace(artifacts={"bundle": published}))
    rows = pd.DataFrame({"label": ["cat", None, None], "prompt": ["a flag", "a flag", None], "seed": [1, 2, 3]})
    answer = model.predict(None, rows, {"steps": 2, "guidance": 3.0})
    said = [json.loads(receipt) for receipt in answer["receipt"]]
    assert [(r["label"], r.get("prompt"), r["guidance"]) for r in said] == [
        ("cat", "a flag", 3.0),
        (None, "a flag", 3.0),
        (None, None, 1.0),
    ]
    wanted = GenerateRequest(prompt="a flag", seed=2, steps=2, guidance=3)
    assert np.array_equal(decode_png(answer["png"][1]), model.engine.generate([wanted])[0][0])
    assert [r["label"] for r in map(json.loads, model.predict(None, rows[["label", "seed"]][:1])["receipt"])] == ["cat"]


def test_the_registrys_model_takes_sizes_where_it_has_several(tmp_path):
    from diffusion.adapters.pyfunc_model import DiffusionModel

    assert signature_of(shaped_bundle().spec).inputs.input_names() == ["label", "size", "seed"]
    model = DiffusionModel()
    model.load_context(SimpleNamespace(artifacts={"bundle": published_model(tmp_path, bundle=shaped_bundle()).uri}))
    answer = model.predict(None, pd.DataFrame({"label": ["cat"] * 2, "size": ["24x8", None], "seed": [1, 1]}))
    assert [decode_png(png).shape for png in answer["png"]] == [(8, 24, 3), (16, 16, 3)]


@pytest.fixture
def commands(tracking, tmp_path) -> dict:
    """How MLflow's own commands are run: knowing nothing but the registry's address."""
    environment = os.environ | mlflow_environment() | {"MLFLOW_TRACKING_URI": tracking.uri}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # as in an activated environment
    return {"cwd": tmp_path, "env": environment | {"PYTHONPATH": str(Path(__file__).parents[2]), "PATH": path}}


ROWS = {"dataframe_records": [{"label": "flags", "seed": 7}]}
LOCAL = ("-m", "models:/smoke@champion", "--env-manager", "local")


def test_mlflow_models_predict_gives_the_bytes_of_the_endpoint(champion, commands, tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    command = [sys.executable, "-m", "mlflow", "models", "predict", *LOCAL, "-i", "rows.json", "-o", "answer.json"]
    done = subprocess.run(command, **commands, capture_output=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr.decode()
    (answer,) = json.loads((tmp_path / "answer.json").read_text())["predictions"]
    png = base64.b64decode(answer["png"])
    assert png == endpoint_png(champion, GenerateRequest(label="flags", seed=7))


def test_mlflow_models_serve_gives_the_bytes_and_refusals_of_the_endpoint(champion, commands, tmp_path):
    url = f"http://127.0.0.1:{(port := free_port())}"
    command = [sys.executable, "-m", "mlflow", "models", "serve", *LOCAL, "--host", "127.0.0.1", "--port", str(port)]
    with (
        open(tmp_path / "log", "wb") as log,
        subprocess.Popen(command, **commands, stdout=log, stderr=log, start_new_session=True) as process,
    ):
        try:
            deadline = time.monotonic() + 500
            while not answers(f"{url}/health"):
                assert process.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() < deadline, (tmp_path / "log").read_text()
                time.sleep(0.2)
            (answer,) = _asked(url, ROWS)["predictions"]
            (misspelt,) = _asked(url, ROWS | {"params": {"step": 2}})["predictions"]
            (cut,) = _asked(url, {"dataframe_records": [{"label": "flags", "seed": 7.9}]})["predictions"]
            (fewer,) = _asked(url, ROWS | {"params": {"steps": 2}})["predictions"]
            with pytest.raises(urllib.error.HTTPError) as refusal:
                _asked(url, {"dataframe_records": [{"label": "flag", "seed": 7}]})
            assert refusal.value.code == 400
            refused = json.load(refusal.value)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
    assert base64.b64decode(answer["png"]) == endpoint_png(champion, GenerateRequest(label="flags", seed=7))
    assert misspelt == cut == answer, "as docs/registry.md says"
    assert fewer["png"] != answer["png"]
    assert "did you mean 'flags'" in refused["message"]
    assert "Traceback" not in json.dumps(refused)


def _asked(url: str, rows: dict) -> dict:
    request = urllib.request.Request(
        f"{url}/invocations", json.dumps(rows).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as got:
        return json.load(got)
