"""A finished training run in a second: real steps on a few pictures, saved by the real checkpoint code."""

from pathlib import Path
from types import SimpleNamespace

import torch

from diffusion.recipe import TrainRecipe, checkpoints_of, digest_of
from diffusion.store.refs import DatasetRef, RunRef
from diffusion.training import checkpoint
from diffusion.training.step import build_state, train_step

CLASSES = ("flags", "food-drink", "smileys-emotion")


def dataset_ref(folder: Path, resolution: int = 32) -> DatasetRef:
    """A dataset's reference; the run below needs no more of it."""
    return DatasetRef(
        uri=str(folder), digest="d" * 64, resolution=resolution, classes=CLASSES, images=48, holdout=12, rejected=0
    )


def make_run(folder: Path, recipe: TrainRecipe, *, steps: int = 2) -> RunRef:
    """Train `steps` steps on fixed noise pictures and save the recipe's checkpoints, and the last, below `folder`."""
    dataset = dataset_ref(folder / "dataset")
    state = build_state(recipe, resolution=dataset.resolution, classes=len(CLASSES), device="cpu")
    facts = checkpoint.facts_of(recipe, dataset, world=1, device=torch.device("cpu"), text=state.text)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        index = torch.arange(recipe.batch_size) + step * recipe.batch_size
        batch = SimpleNamespace(
            images=torch.randint(0, 256, (recipe.batch_size, 3, 32, 32), dtype=torch.uint8, generator=generator),
            label=index % len(CLASSES),
            captions=[f"a {CLASSES[i % len(CLASSES)]} picture" for i in index.tolist()],
            keys=[str(i) for i in index.tolist()],
            index=index,
        )
        train_step(state, batch, recipe)
        if state.images_seen in checkpoints_of(recipe) or step == steps - 1:
            target = checkpoint.folder_of(folder / "checkpoints", state.images_seen)
            digest = checkpoint.save(state, target, facts)
    return RunRef(
        uri=str(target),
        digest=digest,
        recipe_digest=digest_of(recipe),
        dataset=dataset,
        images_seen=state.images_seen,
    )
