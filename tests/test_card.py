"""The model card: it says what was measured, judged and not known, and fits where it is put."""

import pytest

from diffusion.data.manifest import Manifest, Processing, ShardEntry
from diffusion.evaluation.card import DataFacts, Training, card, summary
from diffusion.evaluation.gate.gate import verdict
from diffusion.evaluation.gate.verdict import Check, Verdict
from diffusion.recipe import GateRecipe
from diffusion.store.refs import DatasetRef
from tests.random_bundle import random_spec
from tests.test_gate import report

REPORT = report(problems=())
SPEC = random_spec("bf16", "4" * 64, 1_234_567)
PASSED = verdict(REPORT, None, GateRecipe(max_loss=1.0))
REF = DatasetRef(uri="d", digest="d" * 64, resolution=16, classes=SPEC.classes, images=1_800, holdout=200, rejected=7)
SHARD = {"bytes": 1, "sha256": "a" * 64, "index_sha256": "b" * 64}
COUNTS = tuple(200 * (i + 1) for i in range(len(SPEC.classes)))
MANIFEST = Manifest(
    resolution=16,
    classes=SPEC.classes,
    train_counts=COUNTS,
    holdout_counts=(3,) * len(COUNTS),
    shards=(
        ShardEntry(split="train", pictures=sum(COUNTS), **SHARD),
        ShardEntry(split="holdout", pictures=3 * len(COUNTS), **SHARD),
    ),
    processing=Processing(background="white"),
    recipe_digest="c" * 64,
    files=sum(COUNTS) + 3 * len(COUNTS) + 21,
    set_aside={"duplicate": 14, "unreadable": 7},
)


def made(data: DataFacts = DataFacts(REF), **more) -> str:
    return card(
        "my-model", more.pop("report", REPORT), more.pop("spec", SPEC), more.pop("verdict", PASSED), data, **more
    )


def section(text: str, title: str) -> str:
    return text.split(f"## {title}\n\n")[1].split("\n\n## ")[0]


def test_every_number_has_its_interval_and_all_have_their_identity():
    metrics = section(made(), "Metrics")
    found = REPORT.frechet
    assert f"| frechet | {found.value:.4g} | {found.low:.4g} to {found.high:.4g} |" in metrics
    shown = {line.split(" | ")[0].removeprefix("| ") for line in metrics.splitlines()}
    beside = {name for name in REPORT.metrics() if name.endswith(("_low", "_high", "_standard_error"))}
    assert set(REPORT.metrics()) - shown == beside
    assert {"frechet_low", "held_out_loss_sigma_1_high"} <= beside
    identity = section(made(), "Identity of the numbers")
    for value in ("efficientnet-lite0", REPORT.bundle_digest, found.identity.dataset_digest, "dpmpp_2m"):
        assert value in identity


def test_the_data_are_told_as_far_as_they_are_known():
    unknown = section(made(), "Data")
    assert "| licence | unknown: nobody stated it (`--set data_licence=...`)" in unknown
    assert "manifest was not within reach" in unknown
    assert "The licence of its data is unknown: clear it" in section(made(), "Limits")
    known = DataFacts(REF, MANIFEST, "s3://bucket/photos", "CC-BY | 4.0\n# not a title")
    told = section(made(known), "Data")
    assert "| licence | CC-BY \\| 4.0 # not a title |" in told
    assert "`s3://bucket/photos`" in told
    assert "| set aside | 21 (duplicate 14, unreadable 7) |" in told
    for name, count in zip(SPEC.classes, COUNTS, strict=True):
        assert f"| {name} | {count:,} | 3 |" in told
    assert "unknown" not in section(made(known), "Limits")


def test_the_gates_verdict_and_the_run_are_in_it():
    refused = Verdict(checks=(Check(name="coverage", passed=False, words="it shows too little"),), against="3")
    judged = section(made(verdict=refused), "How the gate judged it")
    assert "The gate **refused** the model; against the champion, version 3." in judged
    assert "it shows too little" in judged
    assert "This MLflow does not know the run" in section(made(), "Training")
    told = section(made(training=Training("run-7", {"lr": "0.1", "unet.channels": "[8,|9]"})), "Training")
    assert "run-7" in told
    assert "| lr | `0.1` |\n| unet.channels | `[8,\\|9]` |" in told


def test_only_pictures_that_are_there_are_shown():
    assert "![" not in made()
    assert made(pictures=("grid.png", "loss.png", "other.png")).count("![") == 2


def test_what_the_model_cannot_do_is_said():
    broken = REPORT.model_copy(update={"problems": ("its pictures are not finite",)})
    assert "**Problem:** its pictures are not finite" in section(made(report=broken), "Limits")
    assert "Whether it repeats training pictures was not measured" in section(made(), "Limits")


@pytest.mark.parametrize("longest", [200, 5_000])
def test_the_short_one_fits_and_leads_to_the_whole(longest):
    long = Verdict(checks=tuple(Check(name="c", passed=False, words="\u00e4" * 900) for _ in range(9)))
    many = SPEC.model_copy(update={"classes": tuple(f"class-{i}" for i in range(1_000))})
    text = summary(REPORT, many, long, DataFacts(REF), where="card.md of run 7", longest=longest)
    assert len(text) == longest
    assert text.endswith(" …\n\nThe whole card: card.md of run 7")
    short = summary(REPORT, SPEC, PASSED, DataFacts(REF), where="there")
    assert len(short) < 5_000
    assert "…" not in short
    assert "The gate passed it" in short
    assert "their licence: unknown" in short
    assert "class-39 and 960 more" in summary(REPORT, many, PASSED, DataFacts(REF), where="there")
