"""The gate's limits: what a model shows, repeats, restores and takes, whatever its Frechet distance."""

import math

import pytest
import scipy.stats

from diffusion.evaluation.facts.memorized import Memorization, MemorizationIdentity
from diffusion.evaluation.facts.neighbours import Measured, Neighbours
from diffusion.evaluation.facts.restoration import Guess, Restoration, RestorationIdentity
from diffusion.evaluation.gate.gate import verdict
from diffusion.evaluation.gate.verdict import Verdict
from diffusion.evaluation.identity import SampleIdentity
from diffusion.evaluation.report.report import Report
from diffusion.recipe import GateRecipe, SamplingRecipe
from diffusion.serving.latency import Latency
from tests.test_gate import IDENTITY, report

GATE = GateRecipe(max_coverage_loss=0.1, max_memorized=0.02, max_restoration_loss=1.0)


def measured(value: float, real: float = 0.8) -> Measured:
    return Measured(value=value, standard_error=0.01, low=value - 0.02, high=value + 0.02, real=real)


def neighbours(coverage: float = 0.6, recall: float = 0.5, **identity) -> Neighbours:
    facts = {name: getattr(IDENTITY, name) for name in SampleIdentity.model_fields if name != "metric"}
    return Neighbours(
        identity=SampleIdentity(metric="neighbours/1", **(facts | identity)),
        confidence=0.95,
        precision=measured(0.7),
        recall=measured(recall),
        density=measured(0.9),
        coverage=measured(coverage),
        real_pictures=512,
        real_against=1_288,
    )


def memorization(share: float, low: float) -> Memorization:
    facts = {name: getattr(IDENTITY, name) for name in SampleIdentity.model_fields if name != "metric"}
    sample = SampleIdentity(metric="memorization/1", **facts)
    identity = MemorizationIdentity(sample=sample, held_out_pictures=200)
    near = round(512 * (share + 0.05))
    return Memorization(
        identity=identity,
        share=share,
        confidence=0.95,
        low=low,
        high=share + 0.03,
        near=near,
        counted=near,
        expected=25.0,
        threshold=0.5,
        pairs=(),
    )


def restoration(
    psnr: float | None, gain: float | None = 1.0, case: str = "colorization", steps: int = 24
) -> Restoration:
    identity = RestorationIdentity(
        dataset_digest="d" * 64,
        pictures=16,
        case=case,
        way="zero-shot",
        sampler="ddim",
        steps=steps,
        repeats=1,
        sigma_min=0.02,
        sigma_max=80.0,
        extractor=IDENTITY.extractor,
        seed=0,
    )
    unknown = dict.fromkeys(name for name in Restoration.model_fields if name.partition("_")[0] in ("ssim", "distance"))
    guess = Guess(name="grey", psnr=15.0, ssim=None, distance=None, consistency=None)
    facts = {"psnr_low": None, "psnr_high": None, "gain_low": None, "gain_high": None, "consistency": 0.0, **unknown}
    each = (psnr,) * identity.pictures
    return Restoration(identity=identity, confidence=0.95, psnr=psnr, each=each, gain=gain, guess=guess, **facts)


def judged(
    gate: GateRecipe = GATE, theirs: dict | None = None, latency: Latency | None = None, **own: object
) -> Verdict:
    """The verdict on a model whose Frechet distance is far better than the champion's."""
    champion: Report = report(900.0, model="b").model_copy(update=theirs or {})
    return verdict(report(100.0).model_copy(update=own), champion, gate, latency=latency)


def refused_for(found: Verdict) -> list[str]:
    return [check.name for check in found.checks if not check.passed]


def test_what_shows_less_than_the_champion_is_refused_though_its_distance_is_lower():
    champion = {"neighbours": neighbours(0.6, 0.5)}
    margin = scipy.stats.norm.ppf((1 + GATE.confidence) / 2) * math.hypot(0.01, 0.9 * 0.01)
    assert judged(neighbours=neighbours(0.541 - margin, 0.451 - margin), theirs=champion).passed
    assert refused_for(judged(neighbours=neighbours(0.539 - margin, 0.5), theirs=champion)) == ["coverage"]
    found = judged(neighbours=neighbours(0.6, 0.4), theirs=champion)
    assert refused_for(found) == ["recall"]
    assert "recall 0.400 against the champion's 0.500: below 0.9 of that by more than 0.022" in found.reasons[0]
    assert judged(neighbours=neighbours(0.3, 0.3)).passed  # the champion's was not measured


def test_who_measures_less_or_otherwise_than_the_champion_does_not_slip_past_a_limit():
    champion = {"neighbours": neighbours(0.6, 0.5), "restoration": (restoration(20.0),)}
    whole = {"neighbours": neighbours(0.6, 0.5), "restoration": (restoration(20.0),)}
    assert judged(**whole, theirs=champion).passed
    found = judged(theirs=champion)
    assert refused_for(found) == ["coverage", "restoration"]
    assert "raise evaluate.samples" in found.reasons[0]
    assert "evaluate.restoration_pictures above 0" in found.reasons[1]
    other = whole | {"neighbours": neighbours(0.7, 0.6, samples=1_024)}
    found = judged(**other, theirs=champion)
    assert refused_for(found) == ["coverage"]
    assert "samples is 1024 here and 512 in the champion's report" in found.reasons[0]
    fewer = restoration(25.0)
    fewer = fewer.model_copy(update={"identity": fewer.identity.model_copy(update={"pictures": 4})})
    found = judged(**whole | {"restoration": (fewer,)}, theirs=champion)
    assert refused_for(found) == ["restoration, colorization"]
    assert "pictures is 4 here and 16 in the champion's report" in found.reasons[0]
    assert refused_for(judged(GATE.model_copy(update={"min_coverage": 0.5}))) == ["coverage"]
    assert refused_for(judged(GATE.model_copy(update={"min_restoration_gain": 0.5}))) == ["restoration"]


def test_a_student_may_show_less_than_its_teacher_by_what_its_distance_may_be_higher():
    gate = GATE.model_copy(update={"max_student_excess": 0.3})
    few = SamplingRecipe(steps=4)
    own = {"neighbours": neighbours(0.41, 0.5, sampling=few), "held_out": ()}
    teacher = {"neighbours": neighbours(0.6, 0.5)}
    assert judged(gate, teacher, **own, teacher="b" * 64).passed
    less = own | {"neighbours": neighbours(0.39, 0.5, sampling=few)}
    assert refused_for(judged(gate, teacher, **less, teacher="b" * 64)) == ["coverage"]


def test_a_floor_of_coverage_is_a_share_of_what_real_pictures_score_and_holds_without_a_champion():
    gate = GATE.model_copy(update={"min_coverage": 0.5})
    for coverage, passed in ((0.41, True), (0.39, False)):
        shown = report(100.0).model_copy(update={"neighbours": neighbours(coverage)})
        found = verdict(shown, None, gate)
        assert found.passed == passed
        assert verdict(shown, None, GATE).passed
    assert found.reasons == ("coverage 0.390 is below 0.5 of what real pictures score",)


def test_copies_of_training_pictures_beyond_doubt_are_refused():
    assert judged(memorization=memorization(0.05, low=0.019)).passed
    found = judged(memorization=memorization(0.05, low=0.021))
    assert refused_for(found) == ["memorization"]
    assert "5.00% of its pictures are copies" in found.reasons[0]
    alone = verdict(report(100.0).model_copy(update={"memorization": memorization(0.3, low=0.2)}), None, GATE)
    assert not alone.passed


def test_a_task_of_restoration_may_not_become_worse_than_the_champions():
    champion = {"restoration": (restoration(20.0), restoration(30.0, case="inpainting"))}
    assert judged(restoration=(restoration(19.1), restoration(29.1, case="inpainting")), theirs=champion).passed
    found = judged(restoration=(restoration(19.1), restoration(28.9, case="inpainting")), theirs=champion)
    assert refused_for(found) == ["restoration, inpainting"]
    assert found.reasons == (
        "inpainting: 28.9 dB against the champion's 30, -1.1 picture by picture (95% interval up to -1.1): beyond doubt"
        " lower by more than gate.max_restoration_loss=1",
    )
    old = {"restoration": tuple(task.model_copy(update={"each": ()}) for task in champion["restoration"])}
    assert all("run again" in reason for reason in judged(restoration=champion["restoration"], theirs=old).reasons)
    assert refused_for(judged(restoration=champion["restoration"], theirs=old))


@pytest.mark.parametrize(("apart", "passes"), [(4, False), (5, True)])
def test_a_loss_of_restoration_counts_where_it_is_beyond_doubt(apart: int, passes: bool):
    """Of 16 differences the interval of the median ends with the fourth largest: that one must be below the limit, too."""
    champion = restoration(20.0)
    each = (*(18.0,) * (16 - apart + 1), *(19.5,) * (apart - 1))
    found = judged(
        restoration=(restoration(18.0).model_copy(update={"each": each}),), theirs={"restoration": (champion,)}
    )
    assert found.passed == passes
    pair = [restoration(psnr).model_copy(update={"each": (psnr,) * 5}) for psnr in (1.0, 20.0)]
    few = judged(restoration=pair[:1], theirs={"restoration": pair[1:]})
    assert few.passed
    assert any("(5 pictures are too few for an interval)" in check.words for check in few.checks)
    assert not any("nan" in check.words for check in few.checks)


def test_restoration_is_held_against_the_champions_as_it_is_served():
    champion = {"restoration": (restoration(20.0), restoration(30.0, case="inpainting"))}
    inpainting = restoration(30.0, case="inpainting")
    assert judged(restoration=(restoration(21.0, steps=2), inpainting), theirs=champion).passed  # each as it is served
    worse = judged(restoration=(restoration(10.0, steps=2), inpainting), theirs=champion)
    assert refused_for(worse) == ["restoration, colorization"]
    broken = judged(restoration=(restoration(None, None), inpainting), theirs=champion)
    assert broken.reasons == ("colorization: its PSNR is not finite, and the champion's is",)


def test_a_floor_of_restoration_is_what_it_gains_over_doing_without_a_model():
    gate = GATE.model_copy(update={"min_restoration_gain": 0.5})
    assert judged(gate, restoration=(restoration(20.0, 0.6),)).passed
    found = judged(gate, restoration=(restoration(20.0, 0.4),))
    assert found.reasons == ("colorization: +0.4 dB to grey, below gate.min_restoration_gain=0.5",)


def test_the_budget_of_time_is_of_the_full_endpoint():
    took = Latency(alone_p50=0.1, alone_p95=0.2, full_p50=0.9, full_p95=1.5, slots=16, device="cpu AVX512")
    assert judged(GATE.model_copy(update={"max_latency_s": 1.6}), latency=took).passed
    found = judged(GATE.model_copy(update={"max_latency_s": 1.4}), latency=took)
    assert refused_for(found) == ["latency"]
    assert "1.5 s with all 16 slots taken" in found.reasons[0]
    assert "latency" not in [check.name for check in judged(latency=took).checks]  # nobody asked


def test_the_champion_itself_is_held_to_no_limit_of_its_own():
    own = report(100.0).model_copy(update={"neighbours": neighbours(0.3)})
    assert verdict(own, report(100.0).model_copy(update={"neighbours": neighbours(0.6)}), GATE).passed
