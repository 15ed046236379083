"""The model card in MLflow: beside the report, in the model's files, and in short as the version's description."""

import tempfile
from pathlib import Path
from shutil import copyfile
from typing import TYPE_CHECKING, NamedTuple

from diffusion.adapters.mlflow_runs import training_run
from diffusion.data.manifest import root_of
from diffusion.data.sources.opening import EMBEDDED, EMBEDDED_LICENCE, uri_of
from diffusion.evaluation.card import FILE, DataFacts, Training, card, summary
from diffusion.evaluation.gate.verdict import Verdict
from diffusion.evaluation.gate.verdict import markdown as verdict_page
from diffusion.evaluation.report.report import load_report
from diffusion.lineage.chain import Missing, find_data
from diffusion.store.bundle_spec import BundleSpec
from diffusion.store.refs import DatasetRef, EvaluationRef

if TYPE_CHECKING:
    from mlflow import MlflowClient

VERDICT_NAME = "verdict.json"


class Written(NamedTuple):
    """What a version says of itself."""

    card: str
    description: str


def write(
    client: "MlflowClient",
    evaluation: EvaluationRef,
    evaluation_run: str,
    spec: BundleSpec,
    verdict: Verdict,
    name: str,
    licence: str | None,
) -> Written:
    """The card of a bundle under a verdict.  licence: of its data; None: nobody said."""
    report, data = load_report(evaluation.uri, evaluation.digest), facts_of(evaluation.run.dataset, licence)
    run = training_run(client, evaluation)
    text = card(
        name,
        report,
        spec,
        verdict,
        data,
        training=run and Training(run.info.run_id, run.data.params),
        pictures=tuple(path.name for path in _pictures(evaluation)),
    )
    where = f"{FILE} among the files of this model, and of MLflow's run {evaluation_run}."
    return Written(text, summary(report, spec, verdict, data, where=where))


def log_judgement(client: "MlflowClient", evaluation_run: str, verdict: Verdict, written: Written) -> None:
    """Put verdict and card beside the report, in place of those that are there."""
    client.log_text(evaluation_run, verdict.model_dump_json(indent=1), VERDICT_NAME)
    client.log_text(evaluation_run, verdict_page(verdict), "verdict.md")
    client.log_text(evaluation_run, written.card, FILE)


def log_card(client: "MlflowClient", evaluation: EvaluationRef, model_id: str, written: Written) -> None:
    """Put the card and its pictures among the model's files, so that who has the model has them."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, FILE).write_text(written.card, encoding="utf-8")
        for picture in _pictures(evaluation):
            copyfile(picture, Path(folder, picture.name))
        client.log_model_artifacts(model_id, folder)


def facts_of(dataset: DatasetRef, licence: str | None) -> DataFacts:
    """What is known of a dataset here.  The licence of the pictures that come with the program is."""
    try:
        found = find_data(root_of(dataset.uri), dataset.digest)
    except Missing:
        return DataFacts(dataset, licence=licence)
    known = EMBEDDED_LICENCE if found.source == uri_of(EMBEDDED) else None
    return DataFacts(dataset, found.manifest, found.source, licence or known)


def _pictures(evaluation: EvaluationRef) -> list[Path]:
    return sorted(Path(evaluation.uri).glob("*.png"))
