"""Real MLflow on SQLite: runs of training works."""

import json
import logging
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from diffusion.adapters import mlflow_runs
from diffusion.adapters.mlflow_runs import finish_run, flatten, live_metrics, log_validation, open_run, recorded
from diffusion.adapters.mlflow_tracking import Tracking, connect
from diffusion.recipe import Recipe
from tests.made_run import dataset_ref


@pytest.fixture
def dataset(home: Path):
    return dataset_ref(home / "dataset")


def _history(client, run_id: str, name: str) -> list[tuple[int, float]]:
    return [(metric.step, metric.value) for metric in client.get_metric_history(run_id, name)]


def test_a_run_states_its_recipe_and_its_data(tracking, client, dataset, tiny_recipe: Recipe, home, tmp_path):
    run_id = open_run(tracking, "train", "1" * 64, tiny_recipe.train, dataset)
    run = client.get_run(run_id)
    assert run.info.status == "RUNNING"
    assert run.data.params == flatten(tiny_recipe.train)
    assert run.data.params["unet.multipliers"] == "[1, 2]"
    assert run.data.params["decay"] == "cosine"
    (given,) = run.inputs.dataset_inputs
    assert {tag.key: tag.value for tag in given.tags}["digest"] == dataset.digest
    assert dataset.digest.startswith(given.dataset.digest)
    assert json.loads(given.dataset.profile)["images"] == 48
    recipe = client.download_artifacts(run_id, "recipe.json", str(tmp_path))
    assert type(tiny_recipe.train).model_validate_json(Path(recipe).read_bytes()) == tiny_recipe.train
    assert run.info.artifact_uri.startswith((home / "mlflow-artifacts").as_uri())


def test_a_process_killed_while_it_makes_the_database_leaves_none(tmp_path: Path) -> None:
    """When alembic has made the first tables and not the last."""
    tracking = Tracking(uri=f"sqlite:///{tmp_path}/mlflow.db", artifacts=str(tmp_path / "artifacts"))
    dying = (
        "import alembic.operations.base as base, os, signal\n"
        "base.Operations.add_column = lambda *given, **named: os.kill(os.getpid(), signal.SIGKILL)\n"
        "from diffusion.adapters.mlflow_tracking import Tracking, connect\n"
        f"connect(Tracking.model_validate_json({tracking.model_dump_json()!r}))\n"
    )
    assert subprocess.run([sys.executable, "-c", dying], check=False).returncode == -signal.SIGKILL
    assert not (tmp_path / "mlflow.db").exists()
    assert connect(tracking).get_experiment_by_name("diffusion") is not None


def test_the_same_work_takes_up_its_run_and_another_work_does_not(tracking, client, dataset, tiny_recipe):
    first = open_run(tracking, "train", "2" * 64, tiny_recipe.train, dataset)
    finish_run(tracking, first, "FAILED", RuntimeError("the worker died"))
    assert client.get_run(first).info.status == "FAILED"
    assert client.get_run(first).data.tags["error"] == "RuntimeError: the worker died"
    assert open_run(tracking, "train", "2" * 64, tiny_recipe.train, dataset) == first
    assert client.get_run(first).info.status == "RUNNING"
    assert len(client.get_run(first).inputs.dataset_inputs) == 1
    assert open_run(tracking, "train", "3" * 64, tiny_recipe.train, dataset) != first


def test_metrics_carry_the_clock_and_a_resumed_run_logs_none_twice(tracking, client, dataset, tiny_recipe):
    run_id = open_run(tracking, "train", "4" * 64, tiny_recipe.train, dataset)
    with live_metrics(tracking, run_id) as log:
        for images_seen in (8, 16, 24):
            log({"images_seen": images_seen, "loss": 1 / images_seen, "keys": ["a"], "done": True})
    with live_metrics(tracking, run_id) as log:  # from the checkpoint at 8
        for images_seen in (16, 24, 32):
            log({"images_seen": images_seen, "loss": 1 / images_seen})
    assert _history(client, run_id, "loss") == [(step, 1 / step) for step in (8, 16, 24, 32)]
    assert client.get_run(run_id).data.metrics.keys() == {"loss"}


def test_metrics_appear_while_the_run_goes_on_and_in_batches(tracking, client, dataset, tiny_recipe):
    run_id = open_run(tracking, "train", "5" * 64, tiny_recipe.train, dataset)
    with live_metrics(tracking, run_id, interval_s=0.5) as log:
        log({"images_seen": 8, "loss": 1.0})
        assert _history(client, run_id, "loss") == []
        deadline = time.monotonic() + 10
        images_seen = 8
        while not _history(client, run_id, "loss"):
            assert time.monotonic() < deadline
            images_seen += 8
            log({"images_seen": images_seen, "loss": 1.0})
    assert len(_history(client, run_id, "loss")) == images_seen // 8


def test_a_validation_comes_late_and_no_training_metric_is_taken_for_logged(
    tracking, client, dataset, tiny_recipe, evaluation, tmp_path, caplog
):
    """Of a moment beyond which a driver that died had logged nothing yet."""
    run_id = open_run(tracking, "train", "e" * 64, tiny_recipe.train, dataset)
    moment = evaluation.run.images_seen
    log_validation(tracking, run_id, evaluation)
    frechet = evaluation.metrics["frechet"]
    assert _history(client, run_id, "quick_frechet") == [(moment, frechet)]
    grid = client.download_artifacts(run_id, f"validation/{moment:012d}/grid.png", str(tmp_path))
    assert Path(grid).read_bytes() == Path(evaluation.uri, "grid.png").read_bytes()
    with live_metrics(tracking, run_id) as log:
        log({"images_seen": moment, "loss": 0.5})
    assert _history(client, run_id, "loss") == [(moment, 0.5)]
    with caplog.at_level(logging.WARNING):
        log_validation(tracking, "0" * 32, evaluation)
    assert evaluation.uri in caplog.text


def test_more_metrics_than_one_request_takes_are_all_logged(tracking, client, dataset, tiny_recipe):
    run_id = open_run(tracking, "train", "6" * 64, tiny_recipe.train, dataset)
    with live_metrics(tracking, run_id, interval_s=60) as log:
        for step in range(1, 401):
            log({"images_seen": step, "loss": 0.5, "lr": 0.1, "images_per_s": 3})
    for name in ("loss", "lr", "images_per_s"):
        assert [step for step, _ in _history(client, run_id, name)] == list(range(1, 401))


@pytest.mark.parametrize(
    ("error", "status"), [(ValueError("x0 is not finite"), "FAILED"), (KeyboardInterrupt(), "KILLED")]
)
def test_a_run_ends_as_its_work_does(tracking, client, dataset, tiny_recipe, error, status):
    work = {"FAILED": "7", "KILLED": "8"}[status] * 64
    run_id = open_run(tracking, "train", work, tiny_recipe.train, dataset)

    def fail() -> None:
        with recorded(tracking, "train", work, tiny_recipe.train, dataset) as (_, log):
            log({"images_seen": 8, "loss": 2.0})
            raise error

    with pytest.raises(type(error)):
        fail()
    run = client.get_run(run_id)
    assert run.info.status == status
    assert type(error).__name__ in run.data.tags["error"]
    assert _history(client, run_id, "loss") == [(8, 2.0)]
    with recorded(tracking, "train", work, tiny_recipe.train, dataset) as (again, _):
        assert again == run_id
    assert client.get_run(run_id).info.status == "FINISHED"


def test_numbers_wait_while_mlflow_is_away(tracking, client, dataset, tiny_recipe, caplog, monkeypatch):
    run_id = open_run(tracking, "train", "9" * 64, tiny_recipe.train, dataset)
    monkeypatch.setattr(mlflow_runs, "_RETRY_S", 0.0)
    with caplog.at_level(logging.WARNING), live_metrics(tracking, run_id, interval_s=0.0) as log:
        client.delete_run(run_id)  # a deleted run takes nothing
        log({"images_seen": 8, "loss": 1.0})
        client.restore_run(run_id)
        log({"images_seen": 16, "loss": 0.5})
    assert "1 wait for the next try" in caplog.text
    assert _history(client, run_id, "loss") == [(8, 1.0), (16, 0.5)]


def test_what_is_lost_for_good_is_an_error(tracking, client, dataset, tiny_recipe):
    from mlflow.exceptions import MlflowException

    run_id = open_run(tracking, "train", "b" * 64, tiny_recipe.train, dataset)

    def lose() -> None:
        with live_metrics(tracking, run_id) as log:
            client.delete_run(run_id)
            log({"images_seen": 8, "loss": 1.0})

    with pytest.raises(MlflowException, match="deleted"):
        lose()


def test_a_server_that_is_not_there_is_named(monkeypatch, tracking):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(ConnectionError, match=r"does not answer at http://127\.0\.0\.1:9: start it"):
        connect(Tracking(uri="http://127.0.0.1:9"))
    connect(tracking)


def test_nothing_is_written_to_the_working_folder(tmp_path, monkeypatch, tracking, tiny_recipe):
    monkeypatch.chdir(tmp_path)
    other = tracking.model_copy(update={"experiment": "other"})
    with recorded(other, "train", "c" * 64, tiny_recipe.train, dataset_ref(tmp_path)) as (run_id, log):
        log({"images_seen": 8, "loss": 1.0})
    assert list(tmp_path.iterdir()) == []
    assert connect(other).get_run(run_id).info.artifact_uri.startswith(Path(tracking.artifacts).as_uri())
