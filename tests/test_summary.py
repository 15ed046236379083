"""flows/summary.py: the best of a run's checkpoints that can be evaluated; numbers; what the gate found of a model."""

from pathlib import Path

import pytest

from diffusion.evaluation.facts.held_out import HeldOutLoss
from diffusion.evaluation.gate.verdict import Check, Verdict
from diffusion.store.refs import DatasetRef, ModelRef, RunRef
from diffusion.training.checkpoint import folder_of
from diffusion.training.journal import SCORE, Journal
from flows.recipes import merged
from flows.summary import measured, registered, trained
from tests.test_gate import report
from tests.test_report import publish

DATASET = DatasetRef(uri="", digest="", resolution=64, classes=("a",), images=1, holdout=0, rejected=0)


def run_with(root: Path, *moments: int) -> RunRef:
    for moment in moments:
        folder_of(root / "checkpoints", moment).mkdir(parents=True)
    last = folder_of(root / "checkpoints", max(moments))
    return RunRef(uri=str(last), digest="d" * 64, recipe_digest="", dataset=DATASET, images_seen=max(moments))


def test_the_best_is_one_that_is_there_by_the_newest_kind_of_measurement(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_with(tmp_path, 10_016, 20_000, 30_016, 33_024)
    trained(run)
    assert "measured" not in capsys.readouterr().out
    journal = Journal(tmp_path / "metrics.jsonl")
    for moment, kind, score in (
        (10_016, "former", 1.0),
        (10_016, "few", 1_700.0),
        (15_008, "few", 1_200.0),  # it went
        (20_000, "few", 1_600.0),
        (30_016, "few", 1_650.0),
    ):
        journal.event({"event": "validated", "images_seen": moment, "recipe": kind, SCORE: score})
    trained(run)
    said = capsys.readouterr().out
    assert "of 3 that were measured on the way: at 20,000 images, quick_frechet 1600\n" in said
    setting = said.split("--set ")[1].split("`")[0]
    assert merged("demo", settings=[setting]).evaluate.images == 20_000


def test_of_a_refused_model_each_check_is_said_on_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    checks = (
        Check(name="sane", passed=True, words="it is sane"),
        Check(name="frechet", passed=False, words="it is worse"),
    )
    verdict = Verdict(checks=checks, against="3")
    model = ModelRef(
        uri="", digest="", name="m", version="4", aliases=(), run_digest="", dataset_digest="", reasons=("it is worse",)
    )
    registered(model, verdict)
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert lines[1:] == [
        "gate       refused; against the champion, version 3",
        "passed   it is sane",
        "refused  it is worse",
    ]
    registered(model, None)
    assert capsys.readouterr().out.endswith("  gate       it is worse\n")


def test_of_few_held_out_pictures_a_number_has_no_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    numbers = ((0.1, 0.5, None, 1), (0.5, 0.4, 0.25, 8), (1.0, 0.25, 0.125, 9), (3.0, None, None, 9))
    levels = tuple(
        HeldOutLoss(sigma=sigma, loss=loss, standard_error=error, zero=1.0, pictures=pictures)
        for sigma, loss, error, pictures in numbers
    )
    measured(publish(tmp_path, report().model_copy(update={"held_out": levels})))
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    said = [line for line in lines if line.startswith("held out")]
    assert said == [
        "held out 0.5 at sigma 0.1",
        "held out 0.4 at sigma 0.5",
        "held out 0.25 ± 0.12 at sigma 1",
        "held out not finite at sigma 3",
    ]
