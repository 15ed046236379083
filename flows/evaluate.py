"""evaluate: a run -> a bundle and a report on it."""

from prefect import flow, task
from prefect.artifacts import create_markdown_artifact

from diffusion.adapters.mlflow_runs import log_evaluation
from diffusion.recipe import EvaluateRecipe
from diffusion.store.refs import EvaluationRef, RunRef
from flows.artifact import with_pictures
from flows.console import progress
from flows.finished import evaluate_key
from flows.retries import TASK
from flows.site import Site, ray_running
from flows.stage import Done, once


@flow(name="evaluate")
def evaluate(recipe: EvaluateRecipe, run: RunRef, name: str = "demo", site: Site | None = None) -> EvaluationRef:
    """Measure a run.  name: of the MLflow experiment.  site: None for the one the worker's environment describes."""
    site = site or Site.from_environment()
    site.prepare()
    return evaluate_stage(recipe, run, name, site).ref


@task(name="evaluate", **TASK)
def evaluate_stage(recipe: EvaluateRecipe, run: RunRef, name: str, site: Site) -> Done[EvaluationRef]:
    def make() -> EvaluationRef:
        from diffusion.adapters.ray_evaluate import evaluate_run  # Ray is not loaded where there is nothing to do

        with ray_running(site), progress("evaluate", "pictures") as update:
            return evaluate_run(
                run,
                recipe,
                site.store,
                actors=site.most_workers,
                use_gpu=site.use_gpu,
                reading=site.reading,
                progress=update,
            )

    def tell(evaluation: EvaluationRef) -> None:
        log_evaluation(site.tracking(name), evaluation, recipe)

    same = "the same run, the same recipe"
    done = once("evaluate", evaluate_key(recipe, run), EvaluationRef, site, make, tell=tell, same=same)
    create_markdown_artifact(
        with_pictures(done.ref.uri, "report.md"), key="evaluation", description=f"Report {done.ref.digest}"
    )
    return done
