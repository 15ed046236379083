"""A quick look at a checkpoint while its run goes on: a small evaluation, whose numbers are named as such."""

from pathlib import Path

from diffusion.data.reading import Reading
from diffusion.evaluation.measure import evaluate
from diffusion.recipe import EvaluateRecipe, TrainRecipe, canonical_json, digest_of
from diffusion.store.publish import withdraw, write_atomic
from diffusion.store.refs import EvaluationRef, RunRef

PREFIX = "quick_"  # before the names of its numbers
_SAMPLES, _HELD_OUT, _COLUMNS = 64, 32, 4
_REAL = 2_000  # pictures of the training split that the samples are compared with


def quick(recipe: EvaluateRecipe, train: TrainRecipe) -> EvaluateRecipe:
    """The small evaluation that looks at checkpoints on the way to this one: fewer samples and held-out pictures, no bound,
    nothing restored, no worse model as a guide, and of the averages that the run keeps the one nearest to that which will be
    served."""
    return EvaluateRecipe.model_validate(
        recipe.model_dump()
        | {
            "samples": min(recipe.samples, _SAMPLES),
            "loss_pictures": min(recipe.loss_pictures, _HELD_OUT),
            "grid_columns": min(recipe.grid_columns, _COLUMNS),
            "bound_steps": 0,
            "restoration_pictures": 0,
            "ema": min(train.ema, key=lambda width: abs(width - recipe.ema)),
            "images": None,
            "guide_images": None,
            "guide_ema": None,
            "sampling": recipe.sampling.model_dump() | {"guidance_kind": "classifier_free"},
        }
    )


def look(checkpoint: RunRef, recipe: EvaluateRecipe, root: Path, *, reading: Reading = Reading()) -> EvaluationRef:
    """Measure a checkpoint of a run, on the CPU, and keep the report below `root`: a function of checkpoint and recipe, done
    once.  Its bundle is not kept.  recipe: of `quick`."""
    root = Path(root)
    key = digest_of({"checkpoint": checkpoint.digest, "recipe": digest_of(recipe)})
    done = root / f"{checkpoint.images_seen}-{key[:16]}.json"
    if done.exists():
        return EvaluationRef.model_validate_json(done.read_bytes())
    found = evaluate(checkpoint, recipe, root, reading=reading, real=_REAL)
    withdraw(Path(found.bundle_uri))  # whole or not at all: half of one would stand in the way of the next try
    write_atomic(done, canonical_json(found))
    return found


def named(found: EvaluationRef) -> dict[str, float]:
    """The numbers of a quick look under names that say so."""
    return {f"{PREFIX}{name}": value for name, value in found.metrics.items()}
