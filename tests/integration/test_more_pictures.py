"""New pictures came: the champion is measured by them, too, before a model of them is held against it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

from diffusion.adapters.mlflow_gate import settle, verdict_of
from diffusion.adapters.mlflow_tracking import Tracking
from diffusion.evaluation.measure import evaluate, evaluate_bundle
from diffusion.evaluation.report.report import load_report
from diffusion.recipe import Recipe
from diffusion.store.works import remember
from flows.finished import evaluate_key, train_key
from tests.evaluated_run import make_run
from tests.program import ROOT, Place


def test_the_champion_is_measured_by_the_new_pictures(place: Place, emoji_folder: Path, tiny_recipe: Recipe) -> None:
    store, grown = place.home / "store", place.root / "pictures"
    shutil.copytree(emoji_folder, grown)
    lines = (grown / "metadata.jsonl").read_text().splitlines()
    for name in (json.loads(line)["file_name"] for line in lines[-5:]):
        (grown / name).unlink()
    (grown / "metadata.jsonl").write_text("\n".join(lines[:-5]) + "\n")
    before = make_run(grown, tiny_recipe, place.root / "before")
    shutil.copytree(emoji_folder, grown, dirs_exist_ok=True)
    after = make_run(grown, tiny_recipe, store)
    first, second = (evaluate(run, tiny_recipe.evaluate, store) for run in (before, after))
    remember(store, train_key(tiny_recipe.train, after.dataset), after)  # as `train` and `evaluate` would
    remember(store, evaluate_key(tiny_recipe.evaluate, after), second)
    tracking = Tracking(uri=f"sqlite:///{place.home}/mlflow.db", artifacts=f"{place.home}/mlflow", experiment="smoke")
    assert settle(tracking, first, tiny_recipe).aliases == ("challenger", "champion")

    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from flows.cli import main; main()",
            "register",
            "--preset",
            "smoke",
            "--source",
            grown,
        ],
        cwd=ROOT,
        env=place.environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "version 1 is measured as this one was" in said
    judged = {check.name: check.words for check in verdict_of(tracking, "smoke", "2").checks}
    assert judged["champion"].startswith("the champion was measured again, as this one was: dataset_digest is ")
    own = load_report(second.uri).frechet
    assert f"Frechet distance {own.value:.4g} against the champion's " in judged["frechet"]

    bundle = (first.bundle_uri, first.bundle_digest)
    here = evaluate_bundle(bundle, after.dataset, tiny_recipe.evaluate, place.root / "other")
    made = store / "evaluations" / here.digest[:16]
    assert Path(here.uri, "report.json").read_bytes() == (made / "report.json").read_bytes()
    champion = load_report(made)
    assert (champion.run_digest, champion.dataset_digest) == (before.digest, after.dataset.digest)
    assert champion.frechet.identity == own.identity
    assert f"against the champion's {champion.frechet.value:.4g}" in judged["frechet"]
