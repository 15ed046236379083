"""The registry on servers as a team has it: a real MLflow on a real PostgreSQL, with its files in a real S3."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
import urllib3.connectionpool

from diffusion.adapters.mlflow_gate import champion_report
from diffusion.adapters.mlflow_registry import look_up, register, resolve
from diffusion.adapters.mlflow_tracking import Tracking, connect
from diffusion.evaluation.gate.verdict import Check, Verdict
from diffusion.evaluation.report.report import load_report
from diffusion.serving.request import GenerateRequest
from diffusion.store.bundle import verify_bundle
from tests.faulty_proxy import FaultyProxy
from tests.killed_registration import Moment, at, registration
from tests.mlflow_server import MlflowServer, mlflow_server
from tests.postgres_server import NoPostgres, postgres
from tests.published import content
from tests.registered_run import FIRST, endpoint_png, evaluated, sampling

MOMENTS = (
    Moment("POST", r"/logged-models$"),
    Moment("PUT", r"weights\.safetensors"),
    Moment("PATCH", r"/logged-models/"),
    Moment("POST", r"/model-versions/create"),
    Moment("POST", r"/model-versions/create", answered=True),
)


@pytest.fixture(scope="module")
def server(s3, short_tmp: Path) -> Iterator[MlflowServer]:
    try:
        with postgres(short_tmp / "pg") as database:
            files = f"{s3.bucket()}/mlflow"
            arguments = ("--backend-store-uri", database, "--artifacts-destination", files)
            with mlflow_server(short_tmp / "mlflow", *arguments, variables=s3.environment) as made:
                yield made
    except NoPostgres as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def tracking(server: MlflowServer) -> Tracking:
    return Tracking(uri=server.url, experiment="team")


def versions(tracking: Tracking, name: str) -> list:
    return list(connect(tracking).search_model_versions(f"name = '{name}'"))


def test_a_team_shares_models(tracking, run, home, tiny_recipe, s3, tmp_path):
    import mlflow

    evaluation = evaluated(home / "store", run, sampling(3), 12.0)
    ref = register(tracking, evaluation, FIRST, "team", tiny_recipe.evaluate)
    assert (ref.version, ref.aliases, ref.reasons) == ("1", ("challenger", "champion"), FIRST.reasons)
    assert register(tracking, evaluation, FIRST, "team", tiny_recipe.evaluate) == ref
    assert champion_report(tracking, "team") == load_report(evaluation.uri)
    fetched = resolve(tracking, "team", "champion", tmp_path)
    assert fetched == ref.model_copy(update={"uri": fetched.uri})
    assert Path(fetched.uri).parents[1] == tmp_path
    answer = mlflow.pyfunc.load_model("models:/team@champion").predict(pd.DataFrame({"label": ["flags"], "seed": [7]}))
    assert answer["png"][0] == endpoint_png(fetched, GenerateRequest(label="flags", seed=7))
    (version,) = versions(tracking, "team")
    assert version.run_id == run.mlflow_run_id
    assert any("weights.safetensors" in asked.path for asked in s3.requests() if asked.method == "PUT")


def test_what_is_longer_than_the_database_takes_is_cut_there_and_whole_in_the_card(tracking, run, home, tiny_recipe):
    """PostgreSQL refuses a description of more than 5,000 characters, which SQLite takes."""
    checks = tuple(Check(name=str(i), passed=False, words=f"reason {i}: " + "\u00e4" * 900) for i in range(12))
    evaluation = evaluated(home / "store", run, sampling(6), 12.0)
    ref = register(tracking, evaluation, Verdict(checks=checks), "long", tiny_recipe.evaluate, "CC-BY 4.0")
    assert ref.aliases == ("challenger",)
    (version,) = versions(tracking, "long")
    assert len(version.description) == 5_000
    client = connect(tracking)
    card = Path(client.download_artifacts(version.tags["evaluation_run"], "card.md")).read_text()
    assert all(f"{check.words} |" in card for check in checks)
    assert "| licence | CC-BY 4.0 |" in card
    model_id = version.source.removeprefix("models:/")
    beside = {file.path for file in client.list_logged_model_artifacts(model_id)}
    assert beside >= {"card.md", "grid.png", "real.png", "MLmodel"}
    assert "![The first samples of each class, none chosen.](grid.png)" in card


def test_files_may_go_to_the_bucket_past_the_server(server, run, home, tiny_recipe, s3, tmp_path):
    place = s3.bucket()
    direct = Tracking(uri=server.url, experiment="direct")
    connect(Tracking(uri=server.url)).create_experiment("direct", artifact_location=f"{place}/mlflow")
    begun = run.model_copy(update={"mlflow_run_id": None})
    evaluation = evaluated(home / "store", begun, sampling(4), 12.0)
    ref = register(direct, evaluation, FIRST, "direct", tiny_recipe.evaluate)
    assert resolve(direct, "direct", "1", tmp_path).digest == ref.digest
    found = s3.client.list_objects_v2(Bucket=place.removeprefix("s3://"), Prefix="mlflow/")["Contents"]
    assert {entry["Key"].rpartition("/")[2] for entry in found} >= {
        "weights.safetensors",
        "bundle.json",
        "MLmodel",
        "report.json",
    }


def test_weights_that_the_server_refuses_go_past_it(server, tracking, run, home, tiny_recipe, s3, tmp_path):
    import mlflow

    place = f"{s3.bucket()}/models"
    evaluation = evaluated(home / "store", run, sampling(5), 12.0)
    with FaultyProxy(server.url, rate=0, max_body=2**17) as proxy:  # as a proxy before a server does with large files
        small = tracking.model_copy(update={"uri": proxy.url})
        with pytest.raises(ValueError, match=r"does not take the weights, .* MiB \(413.*set DIFFUSION_BUNDLES to"):
            register(small, evaluation, FIRST, "large", tiny_recipe.evaluate)
        assert versions(tracking, "large") == []
        past = small.model_copy(update={"bundles": place})
        ref = register(past, evaluation, FIRST, "large", tiny_recipe.evaluate)
    assert (ref.version, ref.aliases) == ("1", ("challenger", "champion"))
    (version,) = versions(tracking, "large")
    spec, digest = verify_bundle(evaluation.bundle_uri)
    assert version.tags["weights_uri"] == f"{place}/bundles/{digest[:16]}"
    assert version.tags["weights_sha256"] == spec.weights_sha256
    put = [asked.path for asked in s3.requests() if asked.method == "PUT" and "weights" in asked.path]
    assert [path for path in put if digest[:16] in path and place.removeprefix("s3://") not in path] == []
    # nobody who reads it needs to know of the place
    fetched = resolve(tracking, "large", "champion", tmp_path)
    assert content(Path(fetched.uri)) == content(Path(evaluation.bundle_uri))
    assert look_up(tracking, "large", "1", tmp_path / "none")[0] == digest
    model = mlflow.pyfunc.load_model("models:/large@champion")
    answer = model.predict(pd.DataFrame({"label": ["flags"], "seed": [7]}))
    assert answer["png"][0] == endpoint_png(fetched, GenerateRequest(label="flags", seed=7))


@pytest.mark.parametrize("moment", MOMENTS, ids=lambda moment: f"{moment.path}{'-answered' * moment.answered}")
def test_a_registration_killed_at_any_step_leaves_no_half_and_is_repeated(
    moment, tracking, run, home, tiny_recipe, tmp_path
):
    number = MOMENTS.index(moment)
    name = f"killed-{number}"
    evaluation = evaluated(home / "store", run, sampling(10 + number), 12.0)
    work = (tracking, evaluation, FIRST, name, tiny_recipe.evaluate)
    assert registration(moment, *work) == -signal.SIGKILL
    left = versions(tracking, name)
    assert len(left) == moment.answered
    for version in left:  # whole, though the process died
        found = resolve(tracking, name, str(version.version), tmp_path / "early")
        assert (found.digest, found.reasons) == (evaluation.bundle_digest, FIRST.reasons)
        assert "The gate passed it" in version.description
    ref = register(*work)
    assert (ref.version, ref.aliases) == ("1", ("challenger", "champion"))
    (version,) = versions(tracking, name)
    assert version.tags["verdict"] == "passed"
    assert champion_report(tracking, name) == load_report(evaluation.uri)
    assert resolve(tracking, name, "champion", tmp_path / "late").digest == evaluation.bundle_digest
    logged = connect(tracking).search_logged_models(
        [connect(tracking).get_run(run.mlflow_run_id).info.experiment_id], f"name = '{name}'"
    )
    assert [model.model_uri for model in logged] == [version.source]  # nothing is left beside it


def test_a_server_killed_meanwhile_is_an_error_and_the_repeat_goes_on(
    server, tracking, run, home, tiny_recipe, monkeypatch
):
    from mlflow.exceptions import MlflowException

    pool = urllib3.connectionpool.HTTPConnectionPool
    monkeypatch.setattr(pool, "urlopen", pool.urlopen)  # as it is afterwards
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    evaluation = evaluated(home / "store", run, sampling(30), 12.0)
    at(Moment("PUT", r"weights\.safetensors"), lambda: server.end(signal.SIGKILL))
    with pytest.raises(MlflowException):
        register(tracking, evaluation, FIRST, "cut", tiny_recipe.evaluate)
    server.start()
    ref = register(tracking, evaluation, FIRST, "cut", tiny_recipe.evaluate)
    assert (ref.version, ref.aliases) == ("1", ("challenger", "champion"))
    assert len(versions(tracking, "cut")) == 1
