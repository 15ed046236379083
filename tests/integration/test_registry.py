"""Real MLflow on SQLite, and one real MLflow server: from an evaluation to a model under an alias."""

import shutil
from collections.abc import Iterator
from functools import partialmethod
from pathlib import Path

import pandas as pd
import pytest

from diffusion.adapters.mlflow_gate import champion_report, settle, stands, verdict_of
from diffusion.adapters.mlflow_listing import models
from diffusion.adapters.mlflow_missing import missing
from diffusion.adapters.mlflow_registry import register, resolve
from diffusion.adapters.mlflow_runs import log_evaluation, recorded
from diffusion.adapters.mlflow_tracking import Tracking
from diffusion.evaluation.gate.verdict import Check, Verdict
from diffusion.evaluation.report.report import load_report
from diffusion.serving.request import GenerateRequest
from diffusion.store.bundle import verify_bundle
from flows.by_digest import bundle_of
from flows.origin import look, resolved
from flows.site import Site
from tests.mlflow_server import mlflow_server
from tests.registered_run import FIRST, endpoint_png, evaluated, sampling

REFUSED = Verdict(
    checks=(Check(name="frechet", passed=False, words="Frechet distance 13 against the champion's 12: not lower"),)
)


# Registering


def test_a_version_carries_its_lineage(champion, evaluation, run, client):
    assert (champion.name, champion.version, champion.aliases) == ("smoke", "1", ("challenger", "champion"))
    assert (champion.uri, champion.digest) == (evaluation.bundle_uri, evaluation.bundle_digest)
    assert (champion.run_digest, champion.dataset_digest) == (run.digest, run.dataset.digest)
    assert champion.reasons == FIRST.reasons
    version = client.get_model_version("smoke", "1")
    expected = {
        "bundle_digest": evaluation.bundle_digest,
        "run_digest": run.digest,
        "dataset_digest": run.dataset.digest,
        "recipe_digest": run.recipe_digest,
        "report_digest": evaluation.digest,
        "verdict": "passed",
    }
    assert version.tags.items() >= expected.items()
    assert version.run_id == run.mlflow_run_id
    for text in (
        "32 x 32",
        "flags, food-drink",
        "| frechet | 12 | 0 to 99 |",
        "passed",
        "there was no champion to compare it with",
    ):
        assert text in version.description


def test_training_starts_from_the_version_that_a_name_means(home, champion, tiny_recipe, run, tmp_path):
    site, resolution = Site(home=home), run.dataset.resolution
    elsewhere = Site(home=tmp_path / "elsewhere", mlflow=site.mlflow_uri)  # where the store does not have the bundle
    for init in ("smoke", "smoke@champion", f"smoke@{champion.version}", champion.digest):
        assert resolved(init, site) == champion.digest
        for at in (site, elsewhere)[: 1 + (init != champion.digest)]:
            begun, spec = look(tiny_recipe.train, init, resolution, at)
            assert (begun.init, spec) == (champion.digest, verify_bundle(champion.uri)[0])
    assert not elsewhere.home.exists()
    with pytest.raises(ValueError, match="no model 'smok' is registered; there are: smoke"):
        look(tiny_recipe.train, "smok", resolution, elsewhere)
    deep = tiny_recipe.train.model_copy(update={"prediction": "v"})
    with pytest.raises(ValueError, match=r"train\.prediction is v"):
        look(deep, "smoke", resolution, elsewhere)
    with pytest.raises(ValueError, match="no alias or version 'tomorrow'"):
        resolved("smoke@tomorrow", site)
    with pytest.raises(ValueError, match="no model 'smok' is registered; there are: smoke"):
        resolved("smok", site)


def test_a_bundle_that_the_store_does_not_have_is_fetched_by_its_digest_alone(home, champion, tmp_path):
    site = Site(home=tmp_path / "elsewhere", mlflow=Site(home=home).mlflow_uri)
    folder = bundle_of(site, champion.digest)
    assert folder.is_relative_to(site.store)
    verify_bundle(folder, champion.digest)
    with pytest.raises(
        ValueError, match=f"{'e' * 16} is neither in {site.store} nor in the registry {site.mlflow_uri}"
    ):
        bundle_of(site, "e" * 64)


def test_the_evaluation_is_a_run_below_the_training_run_and_logged_once(
    champion, tracking, evaluation, run, client, tiny_recipe, tmp_path
):
    logged = log_evaluation(tracking, evaluation, tiny_recipe.evaluate)
    assert logged == client.get_model_version("smoke", "1").tags["evaluation_run"]
    found = client.get_run(logged)
    assert found.info.status == "FINISHED"
    assert found.data.tags["mlflow.parentRunId"] == run.mlflow_run_id
    assert found.data.metrics == pytest.approx(evaluation.metrics)
    assert found.data.params["sampling.steps"] == "3"
    names = {item.path for item in client.list_artifacts(logged)}
    assert names >= {"report.json", "report.md", "grid.png", "recipe.json"}
    client.download_artifacts(logged, "grid.png", str(tmp_path))
    assert (tmp_path / "grid.png").read_bytes() == Path(evaluation.uri, "grid.png").read_bytes()
    assert len(client.get_metric_history(logged, "frechet")) == 2  # of the run, and of the model in it
    model_id = client.get_model_version("smoke", "1").source.removeprefix("models:/")
    metrics = {metric.key: metric.value for metric in client.get_logged_model(model_id).metrics}
    assert metrics["frechet"] == 12.0


def test_the_same_bundle_never_becomes_a_second_version(champion, tracking, evaluation, tiny_recipe, client):
    again = register(tracking, evaluation, FIRST, "smoke", tiny_recipe.evaluate)
    assert again == champion
    versions = client.search_model_versions("name = 'smoke'")
    assert len([v for v in versions if v.tags["bundle_digest"] == evaluation.bundle_digest]) == 1
    assert len(client.get_run(evaluation.run.mlflow_run_id).outputs.model_outputs) == 1


def test_the_logged_model_holds_the_bundle_and_no_pickle(champion, home):
    files = [path for path in (home / "mlflow-artifacts" / "models").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".py", ".txt", ".yaml", ".md", ".png", ""}
    (weights,) = (path for path in files if path.suffix == ".safetensors")
    assert verify_bundle(weights.parent)[1] == champion.digest
    (requirements,) = (path for path in files if path.name == "requirements.txt")
    assert "torch==" in requirements.read_text()
    assert "+" not in requirements.read_text()


# Aliases


def test_champion_moves_only_when_the_gate_passes(home, tracking, run, tiny_recipe, client):
    store, name = home / "store", "aliases"

    def present() -> dict[str, str]:
        return {alias: str(version) for alias, version in client.get_registered_model(name).aliases.items()}

    recipe = tiny_recipe.model_copy(update={"name": name})
    seen = []
    for steps, frechet in ((5, 12.0), (6, 11.95), (7, 9.0)):
        ref = settle(tracking, evaluated(store, run, sampling(steps), frechet), recipe)
        judged = verdict_of(tracking, name, ref.version)
        assert ref.reasons == judged.reasons
        seen.append((judged.passed, ref.version, present()))
    assert judged.against == "1"
    assert seen == [
        (True, "1", {"challenger": "1", "champion": "1"}),
        (False, "2", {"challenger": "2", "champion": "1"}),
        (True, "3", {"challenger": "3", "champion": "3"}),
    ]
    assert resolve(tracking, name, "2", store).aliases == ()
    assert client.get_model_version(name, "2").tags["verdict"] == "refused"
    assert "The gate refused it" in client.get_model_version(name, "2").description


def test_a_new_report_on_a_registered_bundle_replaces_the_one_it_is_judged_by(home, tracking, run, tiny_recipe):
    store, name = home / "store", "judged"
    first = evaluated(store, run, sampling(8), 12.0)
    register(tracking, first, FIRST, name, tiny_recipe.evaluate)
    assert champion_report(tracking, name) == load_report(first.uri)
    second = evaluated(store, run, sampling(8), 12.5, samples=128)
    assert second.bundle_digest == first.bundle_digest
    ref = register(tracking, second, FIRST, name, tiny_recipe.evaluate)
    assert ref.version == "1"
    assert champion_report(tracking, name).frechet.identity.samples == 128


def test_without_a_champion_there_is_no_report(home, tracking, run, tiny_recipe):
    assert champion_report(tracking, "nobody") is None
    register(tracking, evaluated(home / "store", run, sampling(9), 50.0), REFUSED, "refused", tiny_recipe.evaluate)
    assert champion_report(tracking, "refused") is None


def test_a_report_that_was_changed_in_mlflow_is_refused(home, tracking, run, tiny_recipe, client, tmp_path):
    evaluation = evaluated(home / "store", run, sampling(10), 12.0)
    register(tracking, evaluation, FIRST, "changed", tiny_recipe.evaluate)
    changed = tmp_path / "report.json"
    changed.write_bytes(Path(evaluation.uri, "report.json").read_bytes().replace(b"12.0", b" 2.0"))
    client.log_artifact(client.get_model_version("changed", "1").tags["evaluation_run"], str(changed))
    with pytest.raises(ValueError, match=r"version 1 of 'changed' was judged by: it was changed"):
        champion_report(tracking, "changed")


def test_registering_a_champion_puts_a_report_back_that_was_changed_in_mlflow_or_deleted(
    home, tracking, run, tiny_recipe, client
):
    recipe = tiny_recipe.model_copy(update={"name": "mended"})
    evaluation = evaluated(home / "store", run, sampling(15), 12.0)
    ref = settle(tracking, evaluation, recipe)
    kept = client.get_run(client.get_model_version("mended", "1").tags["evaluation_run"]).info
    report = Path(kept.artifact_uri.removeprefix("file://"), "report.json")
    for harm, message in (
        (lambda: report.write_bytes(report.read_bytes().replace(b"12.0", b" 2.0")), "it was changed there"),
        (report.unlink, "is gone from there"),
    ):
        assert stands(tracking, ref, recipe.gate)
        harm()
        with pytest.raises(ValueError, match=message):
            champion_report(tracking, "mended")
        with pytest.raises(ValueError, match=message):
            settle(tracking, evaluated(home / "store", run, sampling(16), 11.0), recipe)
        assert not stands(tracking, ref, recipe.gate)
        assert settle(tracking, evaluation, recipe).version == "1"
        assert champion_report(tracking, "mended") == load_report(evaluation.uri)


# Resolving


@pytest.mark.parametrize("which", ["champion", "challenger", "1"])
def test_an_alias_or_a_number_gives_the_pinned_version_with_its_bundle(champion, tracking, home, which):
    assert resolve(tracking, "smoke", which, home / "store") == champion


def test_where_the_bundle_is_not_in_the_store_it_is_fetched_and_verified(champion, tracking, tmp_path):
    ref = resolve(tracking, "smoke", "champion", tmp_path)
    assert ref == champion.model_copy(update={"uri": ref.uri})
    assert Path(ref.uri) == tmp_path / "bundles" / champion.digest[:16]
    for name in ("bundle.json", "weights.safetensors"):
        assert Path(ref.uri, name).read_bytes() == Path(champion.uri, name).read_bytes()
    assert [path.name for path in (tmp_path / "bundles").iterdir()] == [champion.digest[:16]]
    path = Path(ref.uri, "weights.safetensors")
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(ValueError, match=r"weights\.safetensors: sha256"):
        resolve(tracking, "smoke", "champion", tmp_path)


def test_a_bundle_damaged_in_mlflow_is_not_taken(home, tracking, run, tiny_recipe, client, tmp_path):
    evaluation = evaluated(home / "store", run, sampling(11), 12.0)
    register(tracking, evaluation, FIRST, "damaged", tiny_recipe.evaluate)
    location = client.get_logged_model(client.get_model_version("damaged", "1").source.removeprefix("models:/"))
    folder = Path(location.artifact_location.removeprefix("file://"), "artifacts", evaluation.bundle_digest[:16])
    weights = bytearray((folder / "weights.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "weights.safetensors").write_bytes(weights)
    with pytest.raises(ValueError, match=r"weights\.safetensors: sha256"):
        resolve(tracking, "damaged", "champion", tmp_path)
    assert list((tmp_path / "bundles").iterdir()) == []


def test_all_models_are_named_however_many_there_are(champion, tracking, client, home, monkeypatch):
    """MLflow gives 100 at a time; here one."""
    client.create_registered_model("smoke-beside")
    kind = type(client)
    monkeypatch.setattr(kind, "search_registered_models", partialmethod(kind.search_registered_models, max_results=1))
    assert {"smoke", "smoke-beside"} <= set(models(tracking))
    assert "smoke" in {alias.name for alias in missing(tracking, home / "store")}
    with pytest.raises(ValueError, match=r"there are: .*smoke, smoke-beside"):
        resolve(tracking, "nosuch", "champion", home / "store")


@pytest.mark.parametrize(
    ("name", "which", "message"),
    [
        ("nosuch", "champion", r"no model 'nosuch' is registered; there are: .*smoke"),
        ("smoke", "best", r"no alias or version 'best'; its aliases are: challenger \(version 1\), champion"),
        ("smoke", "7", r"no alias or version '7'; .* its versions: 1\."),
        ("' OR 1", "champion", r"no model \"' OR 1\" is registered"),
    ],
)
def test_what_is_not_there_is_refused_with_what_is(champion, tracking, home, name, which, message):
    with pytest.raises(ValueError, match=message):
        resolve(tracking, name, which, home / "store")


def test_asking_for_a_name_that_is_misspelt_makes_nothing(champion, tracking, client, home, tmp_path):
    with pytest.raises(ValueError, match="no model 'smok' is registered"):
        resolve(tracking.model_copy(update={"experiment": "smok"}), "smok", "champion", home / "store")
    assert client.get_experiment_by_name("smok") is None
    with pytest.raises(ValueError, match="there are: none"):
        resolve(Tracking(uri=f"sqlite:///{tmp_path}/mlflow.db", experiment="smok"), "smok", "champion", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_reasons_longer_than_a_tag_are_cut_and_stay_readable(home, tracking, run, tiny_recipe):
    verbose = Verdict(
        checks=tuple(Check(name="long", passed=False, words=f"{i}: " + "\u00e4" * 600) for i in range(20))
    )
    evaluation = evaluated(home / "store", run, sampling(14), 12.0)
    ref = register(tracking, evaluation, verbose, "verbose", tiny_recipe.evaluate)
    assert ref.reasons[:-1] == tuple(reason[:500] for reason in verbose.reasons[:8])
    assert ref.reasons[-1] == "and 12 more, in verdict.md of the evaluation's run"
    assert resolve(tracking, "verbose", "1", home / "store").reasons == ref.reasons


def test_a_champion_that_never_was_says_so(home, tracking, run, tiny_recipe):
    register(tracking, evaluated(home / "store", run, sampling(12), 50.0), REFUSED, "hopeful", tiny_recipe.evaluate)
    with pytest.raises(ValueError, match=r"aliases are: challenger \(version 1\).*says how the gate judged each"):
        resolve(tracking, "hopeful", "champion", home / "store")


def test_a_version_that_others_registered_is_refused(tracking, client, home):
    client.create_registered_model("foreign")
    client.create_model_version("foreign", str(home / "mlflow-artifacts"), None)
    with pytest.raises(ValueError, match="version 1 of 'foreign' has no bundle"):
        resolve(tracking, "foreign", "1", home / "store")
    client.set_registered_model_alias("foreign", "champion", "1")
    with pytest.raises(ValueError, match="the champion of 'foreign', version 1, has no report"):
        champion_report(tracking, "foreign")


def test_a_run_that_this_mlflow_does_not_know_still_registers(home, tracking, run, tiny_recipe, client):
    """The store recalls finished work although MLflow's database was made anew."""
    stranger = run.model_copy(update={"mlflow_run_id": "0" * 32})
    evaluation = evaluated(home / "store", stranger, sampling(13), 12.0)
    ref = register(tracking, evaluation, FIRST, "stranger", tiny_recipe.evaluate)
    assert (ref.version, ref.aliases) == ("1", ("challenger", "champion"))
    assert champion_report(tracking, "stranger").run_digest == run.digest
    version = client.get_model_version("stranger", "1")
    assert version.run_id == version.tags["evaluation_run"]
    assert "mlflow.parentRunId" not in client.get_run(version.run_id).data.tags


# The same against a server


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    folder = tmp_path / "server"
    store, files = f"sqlite:///{folder}/mlflow.db", str(folder / "files")
    with mlflow_server(folder, "--backend-store-uri", store, "--artifacts-destination", files) as made:
        yield made.url


def test_all_of_it_works_unchanged_against_a_server(server, tmp_path, run, tiny_recipe, monkeypatch):
    import mlflow

    working = tmp_path / "working"
    working.mkdir()
    monkeypatch.chdir(working)
    tracking = Tracking(uri=server, experiment="remote")
    with recorded(tracking, "train", "e" * 64, tiny_recipe.train, run.dataset) as (run_id, log):
        log({"images_seen": 16, "loss": 0.9})
    trained = run.model_copy(update={"mlflow_run_id": run_id})
    store = tmp_path / "store"
    evaluation = evaluated(store, trained, sampling(3), 12.0)
    ref = register(tracking, evaluation, FIRST, "remote", tiny_recipe.evaluate)
    assert (ref.version, ref.aliases) == ("1", ("challenger", "champion"))
    assert register(tracking, evaluation, FIRST, "remote", tiny_recipe.evaluate) == ref
    assert champion_report(tracking, "remote") == load_report(evaluation.uri)
    shutil.rmtree(store)
    fetched = resolve(tracking, "remote", "champion", store)
    assert fetched == ref
    answer = mlflow.pyfunc.load_model("models:/remote@champion").predict(
        pd.DataFrame({"label": ["flags"], "seed": [7]})
    )
    assert answer["png"][0] == endpoint_png(fetched, GenerateRequest(label="flags", seed=7))
    with pytest.raises(ValueError, match="no model 'other' is registered; there are: remote"):
        resolve(tracking, "other", "champion", store)
    assert list(working.iterdir()) == []
