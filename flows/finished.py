"""What earlier commands have made, found without Prefect and Ray: what is missing is said before either is started."""

from pathlib import Path
from typing import TypeVar

from diffusion.data.sources import open_source
from diffusion.data.versions import newest
from diffusion.recipe import (
    EvaluateRecipe,
    Recipe,
    ShardRecipe,
    SweepRecipe,
    TrainRecipe,
    checkpoints_of,
    digest_of,
    tuned,
)
from diffusion.store.codecs import identity_for
from diffusion.store.refs import DatasetRef, EvaluationRef, RunRef, SweepRef
from diffusion.store.storage import open_storage
from diffusion.store.works import recall, work_key
from flows.site import Site

Ref = TypeVar("Ref", DatasetRef, RunRef, SweepRef, EvaluationRef)


def dataset_of(recipe: ShardRecipe, source: str, site: Site) -> DatasetRef:
    """The newest dataset of this source as it is now.  Raises ValueError where there is none."""
    missing = f"source {source} is not sharded with this recipe yet, or has changed since"
    return _there(newest_dataset(recipe, source, site), missing, "shard")


def newest_dataset(recipe: ShardRecipe, source: str, site: Site) -> DatasetRef | None:
    """Likewise, or None."""
    opened = open_source(source, columns=recipe.columns)
    return newest(open_storage(site.data_root), opened.uri, recipe, opened.fingerprint)


def run_of(recipe: TrainRecipe, dataset: DatasetRef, site: Site) -> RunRef:
    """The run that `train` made of this dataset.  Raises ValueError where it has not."""
    ref = recall(site.store, train_key(recipe, dataset), RunRef)
    return _there(ref, "there is no finished training run of this recipe yet", "train")


def in_reach(recipe: TrainRecipe, dataset: DatasetRef, site: Site) -> bool:
    """Whether the run that `train` made of this dataset is finished here, or its last checkpoint is, or a copy of that."""
    from diffusion.training.checkpoint import name_of  # they load torch
    from diffusion.training.copies import copies_in

    key, last = train_key(recipe, dataset), name_of(checkpoints_of(recipe)[-1])
    if recall(site.store, key, RunRef) or (run_folder(key, site) / "checkpoints" / last).is_dir():
        return True
    copies = run_copies(key, site)
    return copies is not None and last in copies_in(open_storage(copies))


def run_folder(key: str, site: Site) -> Path:
    """Where the run of the work `key` lies."""
    return site.store / "runs" / key[:16]


def run_copies(key: str, site: Site) -> str | None:
    """Where its checkpoints are copied to, if the site has them copied."""
    return site.runs and f"{site.runs}/runs/{key[:16]}/checkpoints"


def swept(recipe: Recipe, run: RunRef, site: Site) -> Recipe:
    """The recipe with what the sweep of this run chose, where it asks for one.  Raises ValueError where there is none."""
    if not recipe.sweep.on:
        return recipe
    ref = recall(site.store, sweep_key(recipe.sweep, recipe.evaluate, run), SweepRef)
    found = _there(ref, "the ways of drawing that sweep names are not tried on this run yet", "sweep")
    return recipe.model_copy(update={"evaluate": tuned(recipe.evaluate, found.chosen, found.digest)})


def evaluation_of(recipe: EvaluateRecipe, run: RunRef, site: Site) -> EvaluationRef:
    """The evaluation that `evaluate` made of this run.  Raises ValueError where it has not."""
    ref = recall(site.store, evaluate_key(recipe, run), EvaluationRef)
    return _there(ref, "the run is not evaluated with this recipe yet", "evaluate")


def _there(ref: Ref | None, missing: str, command: str) -> Ref:
    if ref is None:
        raise ValueError(f"{missing}: run `diffusion {command}` with the same options")
    return ref


def train_key(recipe: TrainRecipe, dataset: DatasetRef) -> str:
    """The name of a training run's work."""
    codec = identity_for(recipe)  # its weights are no part of the recipe: with others it is another run
    return work_key("train", recipe, (dataset.digest, *([digest_of(codec)] if codec else [])))


def sweep_key(recipe: SweepRecipe, evaluate: EvaluateRecipe, run: RunRef) -> str:
    """The name of a sweep's work: by what of the evaluation changes its numbers."""
    read = ("sampling", "ema", "images", "guide_images", "guide_ema", "extractor", "extractor_resolution", "batch_size")
    facts = {"sweep": recipe.model_dump(mode="json"), "evaluate": evaluate.model_dump(mode="json", include=set(read))}
    return work_key("sweep", facts, (run.digest,))


def evaluate_key(recipe: EvaluateRecipe, run: RunRef) -> str:
    """The name of an evaluation's work."""
    return work_key("evaluate", recipe, (run.digest,))
