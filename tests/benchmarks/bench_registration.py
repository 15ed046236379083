"""SIGKILL of a registration at each of its moments: `nice -n 19 python -m tests.benchmarks.bench_registration`.

A real MLflow server on a real PostgreSQL, with its files in a real S3.  A moment is one of the registration's requests, to
its last: the process kills itself before it, and another one when the server has answered and it has not heard of it.  What
is left must be no version, or a whole one that can be loaded; then the registration is repeated, and there must be one
version, whole, and one logged model.  Fails where it is not so.
"""

import argparse
import os
import shutil
import tempfile
import time
from collections import Counter
from itertools import count
from pathlib import Path

from diffusion.adapters.mlflow_gate import champion_report
from diffusion.adapters.mlflow_registry import register, resolve
from diffusion.adapters.mlflow_runs import recorded
from diffusion.adapters.mlflow_tracking import Tracking, connect
from diffusion.evaluation.report.report import load_report
from diffusion.presets import PRESETS
from diffusion.recipe import Recipe
from diffusion.store.refs import EvaluationRef, RunRef
from tests.killed_registration import Moment, registration
from tests.made_run import make_run
from tests.mlflow_server import mlflow_server
from tests.postgres_server import postgres
from tests.registered_run import FIRST, evaluated, sampling
from tests.s3_server import s3_server


def whole(tracking: Tracking, name: str, evaluation: EvaluationRef, folder: Path) -> bool:
    """Whether the version 1 can be resolved as who has nothing of it does, and says what it was judged by."""
    try:
        found = resolve(tracking, name, "1", folder / name)
    except (ValueError, KeyError) as error:
        print(f"half: {error!r}")
        return False
    finally:
        shutil.rmtree(folder / name, ignore_errors=True)
    return (found.digest, found.reasons) == (evaluation.bundle_digest, FIRST.reasons)


def versions(tracking: Tracking, name: str) -> int:
    return len(connect(tracking).search_model_versions(f"name = '{name}'"))


def repeated(tracking: Tracking, name: str, evaluation: EvaluationRef, recipe: Recipe, folder: Path) -> bool:
    """Whether the repeat ends with one version, whole, that is champion, and nothing beside it."""
    ref = register(tracking, evaluation, FIRST, name, recipe.evaluate)
    client = connect(tracking)
    experiment = client.get_experiment_by_name(tracking.experiment).experiment_id
    logged = client.search_logged_models([experiment], f"name = '{name}'")
    return (
        (ref.version, ref.aliases, versions(tracking, name), len(logged)) == ("1", ("challenger", "champion"), 1, 1)
        and champion_report(tracking, name) == load_report(evaluation.uri)
        and whole(tracking, name, evaluation, folder)
    )


def kill_at(moment: Moment, tracking: Tracking, run: RunRef, recipe: Recipe, folder: Path) -> tuple[str, bool] | None:
    """What was left by a registration that was killed, and whether its repeat ended well; None where it came to its end."""
    name = f"killed-{moment.number}-{'answered' if moment.answered else 'asking'}"
    evaluation = evaluated(folder / "store", run, sampling(2 + 2 * moment.number + moment.answered), 12.0)
    if registration(moment, tracking, evaluation, FIRST, name, recipe.evaluate) == 0:
        return None
    there = versions(tracking, name)
    kind = "none" if there == 0 else "whole" if there == 1 and whole(tracking, name, evaluation, folder) else "half"
    return kind, repeated(tracking, name, evaluation, recipe, folder)


def kill_at_each(tracking: Tracking, run: RunRef, recipe: Recipe, folder: Path, every: int) -> tuple[Counter, int]:
    """What was left by the killed ones, counted, and how many repeats ended well."""
    left, good = Counter(), 0
    for number in count(1, every):
        for answered in (False, True):
            found = kill_at(Moment("", "", answered=answered, number=number), tracking, run, recipe, folder)
            if found is None:
                return left, good
            left[found[0]] += 1
            good += found[1]
            print(f"request {number}{', answered' * answered}: left {found[0]}; {good} repeats good", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--every", type=int, default=1, help="of the requests")
    every = parser.parse_args().every
    recipe = PRESETS["smoke"]()
    with (
        tempfile.TemporaryDirectory(prefix="br-", dir="/tmp") as name,
        s3_server() as s3,
        postgres(Path(name, "pg")) as database,
    ):
        folder = Path(name)
        os.environ.update(s3.environment)
        stores = ("--backend-store-uri", database, "--artifacts-destination", f"{s3.bucket()}/mlflow")
        with mlflow_server(folder / "mlflow", *stores) as server:
            tracking = Tracking(uri=server.url, experiment="killed")
            run = make_run(folder / "run", recipe.train)
            with recorded(tracking, "train", "c" * 64, recipe.train, run.dataset) as (run_id, _):
                run = run.model_copy(update={"mlflow_run_id": run_id})
            evaluation = evaluated(folder / "store", run, sampling(2), 12.0)
            began = time.monotonic()
            register(tracking, evaluation, FIRST, "first", recipe.evaluate)
            print(f"a registration that is not killed: {time.monotonic() - began:.1f} s", flush=True)
            left, good = kill_at_each(tracking, run, recipe, folder, every)
    print(f"{left.total()} moments: {left['none']} left no version, {left['whole']} a whole one, {left['half']} a half")
    print(f"repeats that ended with one whole version and nothing beside it: {good} of {left.total()}")
    if left["half"] or good < left.total():
        raise SystemExit("a registration was half, or its repeat did not mend it")


if __name__ == "__main__":
    main()
