"""A run against its plan: the one that `diffusion plan` made last for it here, or else one by formula."""

from collections.abc import Mapping

from prefect.artifacts import create_table_artifact

from diffusion.adapters.mlflow_plan import log_plan
from diffusion.planning.foretell import foretell
from diffusion.planning.stages import Compared, Foretold, compared
from diffusion.recipe import Recipe
from diffusion.store.refs import DatasetRef, RunRef
from diffusion.store.works import recall
from flows.console import say, warn
from flows.finished import train_key
from flows.plan import Known, Options, line_of, pictures_of, rates_of, where_of
from flows.plan_notes import learn, noted, starts_of
from flows.plan_told import duration
from flows.site import Site

_BY_FORMULA = "no plan was made before (`diffusion plan`)"


def plan_for(recipe: Recipe, source: str, dataset: DatasetRef, site: Site, *, deploys: bool) -> Foretold | None:
    """The plan of a line whose dataset is there and whose training is not; None where that is finished, too: then hardly
    anything is left to plan."""
    if recall(site.store, train_key(recipe.train, dataset), RunRef):
        return None
    if plan := noted(recipe, source, site):
        return plan
    asked = Options(probed=False, deploys=deploys)
    try:
        known = Known(pictures_of(dataset), sharded=False)
        where = where_of(recipe, source, site, asked)
        line = line_of(recipe, known, where, site, deploys=deploys)
        rates, notes = rates_of(line, known, where, site, asked)
    except (ValueError, RuntimeError) as error:  # a run does not fail of its plan
        warn(f"plan      none could be made: {error}")
        return None
    return foretell(line, where, rates, starts=starts_of(site), notes=(_BY_FORMULA, *notes))


def held_against(plan: Foretold | None, taken: Mapping[str, float], name: str, run: RunRef, site: Site) -> None:
    """Say, and note in MLflow and in Prefect, what the stages took against the plan.  taken: seconds of those that did work.
    A run has ended well by now, and does not fail of this."""
    rows = compared(plan, dict(taken)) if plan else []
    if not rows:
        return
    *stages, whole = rows
    parts = ", ".join(f"{row.stage} {duration(row.planned_s)} and {duration(row.taken_s)}" for row in stages)
    say(
        f"  plan      {plan.how} {duration(whole.planned_s)}, taken {duration(whole.taken_s)}"
        f" ({whole.ratio:.2f} times): {parts}"
    )
    learn(plan, stages, site)
    create_table_artifact(table_of(rows), key="plan", description=f"Planned {plan.how}, and taken")
    if run.mlflow_run_id is None:
        return
    reason = log_plan(site.tracking(name), run.mlflow_run_id, plan, rows)
    if reason is not None:
        warn(f"plan      MLflow did not take the plan and what it took ({reason}); Prefect has both")


def table_of(rows: list[Compared]) -> list[dict[str, str | float]]:
    """For Prefect's page."""
    return [
        {
            "stage": row.stage,
            "planned, s": round(row.planned_s, 1),
            "taken, s": round(row.taken_s, 1),
            "taken / planned": round(row.ratio, 3),
        }
        for row in rows
    ]
