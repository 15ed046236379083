"""A home with all that a line publishes, made in seconds: a dataset, a run of two steps, its bundle."""

import shutil
from pathlib import Path

from diffusion.recipe import Recipe
from diffusion.store.bundle import export_bundle
from diffusion.store.refs import RunRef
from tests.evaluated_run import make_run

RUN = "run.json"  # in the home: the reference to its run
KEY = "0123456789abcdef"


def make_home(home: Path, source: Path, recipe: Recipe) -> RunRef:
    """Shard the source, train two steps and export the bundle, each where the program puts it."""
    run = make_run(source, recipe, home / "store")
    checkpoints = home / "store" / "runs" / KEY / "checkpoints"
    checkpoints.parent.mkdir(parents=True)
    shutil.move(Path(run.uri).parent, checkpoints)
    run = run.model_copy(update={"uri": str(checkpoints / Path(run.uri).name)})
    export_bundle(run, recipe.evaluate.ema, home / "store", recipe.evaluate.sampling)
    (home / RUN).write_text(run.model_dump_json())
    return run


def run_of(home: Path) -> RunRef:
    return RunRef.model_validate_json((home / RUN).read_text())


def bundle_in(home: Path) -> Path:
    (folder,) = (home / "store" / "bundles").iterdir()
    return folder
