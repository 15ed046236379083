"""The gate: who passes, who does not, and that every refusal names each of its reasons."""

import math

import pytest
import scipy.stats

from diffusion.evaluation.extractors.features import ExtractorIdentity
from diffusion.evaluation.facts.distance import Frechet
from diffusion.evaluation.facts.held_out import HeldOutLoss
from diffusion.evaluation.gate.gate import verdict
from diffusion.evaluation.gate.verdict import Verdict, markdown
from diffusion.evaluation.identity import SampleIdentity, check_alike, differences
from diffusion.evaluation.report.report import Environment, Report
from diffusion.recipe import GateRecipe, SamplingRecipe
from tests.jackknifed import left_out

IDENTITY = SampleIdentity(
    metric="frechet/1",
    dataset_digest="d" * 64,
    reference_pictures=1_800,
    extractor=ExtractorIdentity(name="efficientnet-lite0", digest="e" * 64, resolution=96),
    dimensions=1_280,
    samples=512,
    sampling=SamplingRecipe(),
    batch_size=32,
    seed=0,
)
GATE = GateRecipe(confidence=0.9, max_loss=1.0)


def report(
    value: float | None = 100.0,
    error: float = 3.0,
    *,
    model: str = "a",
    losses: tuple[float | None, ...] = (0.2, 0.4),
    identity: SampleIdentity = IDENTITY,
    problems: tuple[str, ...] = (),
) -> Report:
    distance = None
    if value is not None:
        distance = Frechet(
            identity=identity,
            value=value,
            standard_error=error,
            left_out=left_out(value, error, 32, pattern=ord(model) - 96),
            confidence=0.95,
            low=value - 2 * error,
            high=value + 2 * error,
        )
    return Report(
        bundle_digest=model * 64,
        run_digest="1" * 64,
        recipe_digest="2" * 64,
        dataset_digest="d" * 64,
        classes=("flags", "faces"),
        images_seen=64_000,
        ema=0.1,
        frechet=distance,
        floor=None,
        held_out=tuple(
            HeldOutLoss(sigma=10.0**i, loss=loss, standard_error=0.01, zero=1.0, pictures=64)
            for i, loss in enumerate(losses)
        ),
        seed=0,
        problems=problems,
        environment=Environment(torch="2.13.0", device="cpu"),
    )


def test_the_first_sane_model_passes():
    found = verdict(report(), None, GATE)
    assert found.passed
    assert "there was no champion" in " ".join(found.reasons)


@pytest.mark.parametrize(
    ("challenger", "gate", "reasons"),
    [
        (report(losses=(0.2, 1.3)), GATE, ["loss 1.3 at sigma 10", "gate.max_loss=1"]),
        (report(losses=(1.0,)), GATE, ["loss 1 at sigma 1 is not below"]),
        (report(losses=(None, 0.4)), GATE, ["at sigma 1 is not finite"]),
        (report(losses=()), GATE, ["held-out loss was not measured", "shard.holdout"]),
        (report(None, problems=("the answer is not finite",)), GATE, ["gives no pictures: the answer is not finite"]),
        (report(100.0), GATE.model_copy(update={"max_frechet": 99.0}), ["100 is above gate.max_frechet=99"]),
        (report(None, losses=(2.0, None)), GATE, ["distance was not measured", "loss 2 at sigma 1", "sigma 10 is not"]),
    ],
)
@pytest.mark.parametrize("champion", [None, report(10_000.0, model="b")])
def test_a_model_that_is_not_sane_never_passes(challenger, gate, reasons, champion):
    found = verdict(challenger, champion, gate)
    assert not found.passed
    for reason in reasons:
        assert reason in " ".join(found.reasons)


@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.99])
def test_better_means_by_more_than_the_half_width_of_the_differences_interval(confidence):
    gate = GateRecipe(confidence=confidence)
    champion = report(200.0, 4.0, model="b")
    margin = scipy.stats.t.ppf((1 + confidence) / 2, 31) * math.hypot(3.0, 4.0)
    assert verdict(report(200 - margin - 0.05, 3.0), champion, gate).passed
    refused = verdict(report(200 - margin + 0.05, 3.0), champion, gate)
    assert not refused.passed
    assert "not lower by more than" in refused.reasons[-1]
    assert not verdict(report(300.0), champion, gate).passed


def test_what_the_common_noise_does_to_both_is_not_held_against_the_challenger():
    """Models that drew from the same noise are lucky together: the interval is of the difference, block by block."""
    champion = report(200.0, 10.0, model="b")
    alike = report(195.0, 10.0, model="b").model_copy(update={"bundle_digest": "c" * 64})
    assert verdict(alike, champion, GATE).passed
    assert not verdict(report(195.0, 10.0), champion, GATE).passed


def test_a_model_of_which_a_sweep_chose_how_it_draws_is_compared_as_it_is_served():
    few = IDENTITY.model_copy(update={"sampling": SamplingRecipe(steps=12, guidance=4)})
    champion, better = report(200.0, 4.0, model="b"), report(100.0, 4.0, identity=few)
    assert not verdict(better, champion, GATE).passed, "unlike numbers are not compared"
    chosen = {"chosen_by": "5" * 64}
    for one, other in ((better.model_copy(update=chosen), champion), (better, champion.model_copy(update=chosen))):
        found = verdict(one, other, GATE)
        assert found.passed
        assert "(dpmpp_2m, 12 steps, guidance 4)" in found.reasons[-1]
        assert "(dpmpp_2m, 24 steps, guidance 2.5)" in found.reasons[-1]
    elsewhere = few.model_copy(update={"seed": 7})
    refused = verdict(report(100.0, 4.0, identity=elsewhere).model_copy(update=chosen), champion, GATE)
    assert "seed is 7" in " ".join(refused.reasons), "all else is equal still"


@pytest.mark.parametrize("share", [0.05, 0.5])
def test_a_higher_distance_may_count_as_equal_where_the_recipe_says_so(share):
    gate = GATE.model_copy(update={"max_excess": share})
    champion, allowed = report(100.0, 4.0, model="b"), 1 + share
    margin = scipy.stats.t.ppf(0.95, 31) * math.hypot(3.0, allowed * 4.0)
    passed = verdict(report(100 * allowed - margin - 0.05), champion, gate, against="7")
    assert passed.passed
    assert passed.against == "7"
    refused = verdict(report(100 * allowed - margin + 0.05), champion, gate)
    assert not refused.passed
    assert f"not below {allowed:g} times that" in refused.reasons[-1]


def test_equal_or_worse_stays_challenger():
    assert not verdict(report(100.0, 0.0), report(100.0, 0.0, model="b"), GATE).passed


def test_the_champion_itself_passes_and_what_another_measurement_changed_is_said():
    def said(former: Report) -> str:
        found = verdict(report(403.0, identity=small), former, GATE)
        assert found.passed
        return found.checks[1].words

    small = IDENTITY.model_copy(update={"extractor": IDENTITY.extractor.model_copy(update={"resolution": 64})})
    assert said(report(403.0, identity=small)) == "it is the champion itself"
    assert said(report(67.25)) == (
        "it is the champion itself, measured anew: extractor.resolution is 64 here and 96 in its former report;"
        " Frechet distance 403, was 67.25"
    )
    assert "which was not measured before" in said(report(None))


def test_unlike_numbers_are_refused_and_every_difference_is_named():
    other = IDENTITY.model_copy(
        update={
            "samples": 1_024,
            "extractor": IDENTITY.extractor.model_copy(update={"resolution": 64}),
            "sampling": SamplingRecipe(steps=50),
        }
    )
    found = verdict(report(1.0, identity=IDENTITY), report(900.0, model="b", identity=other), GATE)
    assert not found.passed
    assert found.reasons[:-1] == (
        "extractor.resolution is 96 here and 64 in the champion's report",
        "samples is 512 here and 1024 in the champion's report",
        f"sampling.steps is {IDENTITY.sampling.steps} here and 50 in the champion's report",
    )
    assert "not compared" in found.reasons[-1]


@pytest.mark.parametrize("field", sorted(SampleIdentity.model_fields))
def test_every_field_of_the_identity_counts(field):
    changed = {
        "extractor": IDENTITY.extractor.model_copy(update={"digest": "f" * 64}),
        "sampling": SamplingRecipe(guidance=2.0),
    }.get(field, 7 if isinstance(getattr(IDENTITY, field), int) else "another")
    other = IDENTITY.model_copy(update={field: changed})
    assert len(differences(IDENTITY, other)) == 1
    with pytest.raises(ValueError, match=f"not compared: .*{field}"):
        check_alike(IDENTITY, other)
    assert not verdict(report(1.0), report(900.0, model="b", identity=other), GATE).passed


def test_a_champion_without_a_distance_cannot_be_beaten():
    found = verdict(report(), report(None, model="b"), GATE)
    assert not found.passed
    assert "the champion has no Frechet distance" in found.reasons[0]


def test_a_verdict_is_a_value():
    refused = verdict(report(300.0), report(model="b"), GATE, against="3")
    assert Verdict.model_validate_json(refused.model_dump_json()) == refused
    assert [check.name for check in refused.checks] == ["sane", "frechet"]
    assert refused.checks[1].value == 300
    page = markdown(refused)
    assert "The gate **refused** the model; against the champion, version 3." in page
    assert "| frechet | **refused** | 300 |" in page
    assert "| sane | passed |" in page
    assert Verdict.model_validate_json(verdict(report(), None, GATE).model_dump_json()) == verdict(report(), None, GATE)
