"""sweep: a run -> the way of drawing with it that is evaluated, registered and served."""

from prefect import flow, task
from prefect.artifacts import create_markdown_artifact

from diffusion.adapters.mlflow_runs import log_sweep
from diffusion.recipe import EvaluateRecipe, Recipe, SweepRecipe, tuned
from diffusion.store.refs import RunRef, SweepRef
from flows.artifact import with_pictures
from flows.console import progress
from flows.finished import sweep_key
from flows.retries import TASK
from flows.site import Site, ray_running
from flows.stage import Done, once


@flow(name="sweep")
def sweep(
    recipe: SweepRecipe, evaluate: EvaluateRecipe, run: RunRef, name: str = "demo", site: Site | None = None
) -> SweepRef:
    """Try ways of drawing with a run.  evaluate: what is not tried is as it says.  name: of the MLflow experiment.  site:
    None for the one the worker's environment describes.
    """
    site = site or Site.from_environment()
    site.prepare()
    return sweep_stage(recipe, evaluate, run, name, site).ref


@task(name="sweep", **TASK)
def sweep_stage(recipe: SweepRecipe, evaluate: EvaluateRecipe, run: RunRef, name: str, site: Site) -> Done[SweepRef]:
    def make() -> SweepRef:
        from diffusion.adapters.ray_sweep import sweep_run  # Ray is not loaded where there is nothing to do

        with ray_running(site), progress("sweep", "pictures") as update:
            return sweep_run(
                run,
                recipe,
                evaluate,
                site.store,
                actors=site.most_workers,
                use_gpu=site.use_gpu,
                reading=site.reading,
                progress=update,
            )

    def tell(found: SweepRef) -> None:
        log_sweep(site.tracking(name), found, recipe)

    same = "the same run, the same ways of drawing"
    done = once("sweep", sweep_key(recipe, evaluate, run), SweepRef, site, make, tell=tell, same=same)
    create_markdown_artifact(
        with_pictures(done.ref.uri, "sweep.md"), key="sweep", description=f"Sweep {done.ref.digest}"
    )
    return done


def swept_stages(recipe: Recipe, run: RunRef, site: Site) -> tuple[Recipe, tuple[Done[SweepRef], ...]]:
    """The recipe with what its sweep of this run chose, and that stage; as it is where nothing is to be tried."""
    if not recipe.sweep.on:
        return recipe, ()
    done = sweep_stage(recipe.sweep, recipe.evaluate, run, recipe.name, site)
    return recipe.model_copy(update={"evaluate": tuned(recipe.evaluate, done.ref.chosen, done.ref.digest)}), (done,)
