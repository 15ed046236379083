"""What checkpoints are worth, shown while the run goes on: in MLflow beside the losses, in Prefect as a page."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from httpx import HTTPError
from prefect.artifacts import create_markdown_artifact
from prefect.exceptions import PrefectException

from diffusion.adapters.mlflow_runs import log_validation
from diffusion.adapters.mlflow_tracking import Tracking
from diffusion.adapters.ray_validate import Validation, validating
from diffusion.evaluation.quick import quick
from diffusion.recipe import EvaluateRecipe, TrainRecipe
from diffusion.store.refs import DatasetRef, EvaluationRef
from flows.artifact import with_pictures
from flows.console import warn
from flows.site import Site


@contextmanager
def watched(
    site: Site,
    run_dir: Path,
    recipe: TrainRecipe,
    dataset: DatasetRef,
    evaluate: EvaluateRecipe,
    *,
    shown: tuple[Tracking, str],
    on_event: Callable[[dict], None],
) -> Iterator[Validation | None]:
    """The validation of a run for the length of the block, None where the site wants none.  shown: MLflow and its run."""
    if not site.validates:
        yield None
        return
    with validating(
        run_dir,
        recipe,
        dataset,
        quick(evaluate, recipe),
        reading=site.reading,
        on_result=lambda found: _show(*shown, found),
        on_event=on_event,
    ) as validation:
        yield validation


def _show(tracking: Tracking, run_id: str, found: EvaluationRef) -> None:
    """Where that fails the run goes on, and the report is in its folder."""
    moment = f"{found.run.images_seen:,} pictures"
    try:
        log_validation(tracking, run_id, found)
        page = with_pictures(found.uri, "report.md")
        create_markdown_artifact(page, key="validation", description=f"Quick look at {moment}")
    except (PrefectException, HTTPError) as error:
        warn(f"Prefect does not show what was found at {moment}, {found.uri} does: {error}")
