"""Where to run the program; and a real MLflow on SQLite, with a run and a registered model: one of each for a file that
asks."""

from pathlib import Path

import pytest

from diffusion.adapters.mlflow_registry import register
from diffusion.adapters.mlflow_runs import recorded
from diffusion.adapters.mlflow_tracking import Tracking, connect
from diffusion.recipe import Recipe
from diffusion.store.refs import EvaluationRef, ModelRef, RunRef
from tests.made_run import make_run
from tests.program import Place
from tests.registered_run import FIRST, evaluated, sampling


@pytest.fixture
def place(short_tmp: Path, request: pytest.FixtureRequest) -> Place:
    root = short_tmp / request.node.name[-8:]
    root.mkdir()
    return Place(root)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def tracking(home: Path) -> Tracking:
    return Tracking(uri=f"sqlite:///{home}/mlflow.db", artifacts=str(home / "mlflow-artifacts"), experiment="smoke")


@pytest.fixture(scope="module")
def run(home: Path, tracking: Tracking, tiny_recipe: Recipe) -> RunRef:
    """A finished run that MLflow knows."""
    made = make_run(home / "run", tiny_recipe.train)
    with recorded(tracking, "train", "c" * 64, tiny_recipe.train, made.dataset) as (run_id, log):
        log({"images_seen": made.images_seen, "loss": 0.9})
    return made.model_copy(update={"mlflow_run_id": run_id})


@pytest.fixture(scope="module")
def evaluation(home: Path, run: RunRef) -> EvaluationRef:
    return evaluated(home / "store", run, sampling(3), 12.0)


@pytest.fixture(scope="module")
def champion(tracking: Tracking, evaluation: EvaluationRef, tiny_recipe: Recipe) -> ModelRef:
    return register(tracking, evaluation, FIRST, "smoke", tiny_recipe.evaluate)


@pytest.fixture
def client(tracking: Tracking):
    return connect(tracking)
