"""What a run was foretold to take and what it took, with the training run in MLflow."""

import time
from collections.abc import Sequence

from diffusion.adapters.mlflow_tracking import Tracking, connect
from diffusion.planning.stages import Compared, Foretold

PLAN = "plan.json"


def log_plan(tracking: Tracking, run_id: str, plan: Foretold, rows: Sequence[Compared]) -> str | None:
    """`plan_<stage>_s`, `taken_<stage>_s` and `taken_over_plan_<stage>` as metrics of the run, and the plan beside it.
    Returns why MLflow did not take them, where it did not."""
    from mlflow.entities import Metric
    from mlflow.exceptions import MlflowException

    now, metrics = int(time.time() * 1_000), []
    for row in rows:
        named = {"plan_{}_s": row.planned_s, "taken_{}_s": row.taken_s, "taken_over_plan_{}": row.ratio}
        metrics += [Metric(name.format(row.stage), value, now, 0) for name, value in named.items()]
    try:
        client = connect(tracking)
        client.log_batch(run_id, metrics=metrics)
        client.log_dict(run_id, plan.model_dump(mode="json"), PLAN)
    except (MlflowException, OSError) as error:
        return " ".join(str(error).split())[:200]
    return None
