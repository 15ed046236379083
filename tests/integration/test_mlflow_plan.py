"""Real MLflow on SQLite: what a run was planned to take and what it took lie with it."""

import json
from pathlib import Path

import pytest

from diffusion.adapters.mlflow_plan import PLAN, log_plan
from diffusion.adapters.mlflow_runs import finish_run, open_run
from diffusion.planning.foretell import Where, foretell
from diffusion.planning.stages import Foretold, compared
from diffusion.recipe import Recipe
from flows.planned import table_of
from tests.made_run import dataset_ref
from tests.test_planning import RATES, line_of


def test_a_finished_run_is_given_its_plan_and_what_it_took(tracking, client, home: Path, tiny_recipe: Recipe, tmp_path):
    run_id = open_run(tracking, "train", "a" * 64, tiny_recipe.train, dataset_ref(home / "dataset"))
    finish_run(tracking, run_id)
    plan = foretell(line_of(tiny_recipe), Where(workers=2, cpus=2), RATES)
    rows = compared(plan, {"train": 30.0, "shard": 2 * plan.stage("shard").seconds})
    assert log_plan(tracking, run_id, plan, rows) is None
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.metrics["plan_train_s"] == plan.stage("train").seconds
    assert run.data.metrics["taken_train_s"] == 30
    assert run.data.metrics["taken_over_plan_shard"] == 2
    assert run.data.metrics["taken_all_s"] == pytest.approx(30 + 2 * plan.stage("shard").seconds)
    kept = client.download_artifacts(run_id, PLAN, str(tmp_path))
    assert Foretold.model_validate(json.loads(Path(kept).read_bytes())) == plan
    assert [row["stage"] for row in table_of(rows)] == ["shard", "train", "all"]


def test_an_mlflow_that_does_not_know_the_run_ends_no_run(tracking, tiny_recipe: Recipe):
    plan = foretell(line_of(tiny_recipe), Where(workers=2, cpus=2), RATES)
    why = log_plan(tracking, "f" * 32, plan, compared(plan, {"train": 1.0}))
    assert "f" * 32 in why
