"""What a command of the line works with: its recipe and site, and the dataset or the run that it goes on from."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from diffusion.recipe import Recipe
from flows import cli_data, origin, recipes
from flows.console import waiting
from flows.foreground import guarded, reported
from flows.site import Site

if TYPE_CHECKING:
    from diffusion.store.refs import DatasetRef, RunRef

EMBEDDED = (
    "embedded"  # the word for the pictures that come with the program; `data.sources` loads more than a start needs
)


def named_dataset(dataset: str | None, source: str | None, site: Site) -> "DatasetRef | None":
    """The published dataset that is named, if any is.  Ask before anything is started."""
    from diffusion.data.datasets import find

    if dataset is None:
        return None
    if source is not None:
        raise ValueError(f"--source {source} and --dataset {dataset}: give one of the two")
    return find(cli_data.data_root(site), dataset).whole()


def made_dataset(recipe: Recipe, named: str | None, source: str | None, site: Site) -> "DatasetRef":
    """The published dataset that is named, or the one that `shard` made of the source."""
    from flows.finished import dataset_of

    with waiting("reading the source" if named is None else "looking at the dataset"):
        return named_dataset(named, source, site) or dataset_of(recipe.shard, source or EMBEDDED, site)


def trained_run(recipe: Recipe, named: str | None, source: str | None, init: str | None, site: Site) -> "RunRef":
    """The run that `train` made of that dataset."""
    from flows.finished import run_of

    dataset = made_dataset(recipe, named, source, site)
    return run_of(origin.started_from(recipe.train, init, dataset, site), dataset, site)


def do(
    work: Callable[[Recipe, Site], None],
    debug: bool,
    preset: str,
    recipe_file: Path | None,
    settings: list[str] | None,
    name: str | None,
    run: Callable[..., None] = guarded,
    **site: object,
) -> None:
    """Run a command on its recipe and site."""
    with reported(debug=debug):
        recipe = recipes.merged(preset, file=recipe_file, settings=settings or (), name=name)
    run(lambda where: work(recipe, where), debug, **site)
