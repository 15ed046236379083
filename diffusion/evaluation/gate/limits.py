"""Limits that a model must keep whatever its Frechet distance: it shows what the champion shows, repeats no training
pictures, restores as well, and answers in time."""

import math
from statistics import NormalDist

import numpy as np

from diffusion.evaluation.facts.neighbours import Measured
from diffusion.evaluation.facts.restoration import Restoration, of_median
from diffusion.evaluation.gate.verdict import Check
from diffusion.evaluation.identity import differences
from diffusion.evaluation.metrics.intervals import CONFIDENCE, digits
from diffusion.evaluation.report.report import Report
from diffusion.recipe import GateRecipe
from diffusion.serving.latency import Latency

# of the identity of a restoration: the truth is the same however a model comes near it, so each is taken as it is served
_AS_SERVED = ("way", "sampler", "steps", "repeats", "sigma_")


def limits_of(report: Report, champion: Report | None, gate: GateRecipe, latency: Latency | None) -> list[Check]:
    """A check for each limit that is set, or whose number the champion has.

    One whose number was not measured of this model, or otherwise than the champion's, is not kept: a recipe that measures
    less is no way around it.
    """
    if champion is not None and champion.bundle_digest == report.bundle_digest:
        champion = None
    checks = _copies(report, gate) + _shown(report, champion, gate) + _restored(report, champion, gate)
    if gate.max_latency_s is not None and latency is not None:
        checks.append(_answers(latency, gate.max_latency_s))
    return checks


def may_differ(report: Report, champion: Report) -> str | None:
    """How the names of what may differ in the identities of the two begin.  A student draws otherwise than its teacher, that
    being its purpose; where a sweep chose how a model draws, it is compared as it is served."""
    taught = report.teacher == champion.bundle_digest
    return "sampling." if taught or report.chosen_by or champion.chosen_by else None


def _copies(report: Report, gate: GateRecipe) -> list[Check]:
    found = report.memorization
    if found is None:
        return []
    passed = found.low <= gate.max_memorized
    words = (
        f"{found.share:.2%} of its pictures are copies of training pictures ({found.confidence:.0%} interval {found.low:.2%}"
        f" to {found.high:.2%}): {'not ' if passed else ''}beyond doubt more than gate.max_memorized={gate.max_memorized:g}"
    )
    return [Check(name="memorization", passed=passed, words=words, value=found.low, limit=gate.max_memorized)]


def _shown(report: Report, champion: Report | None, gate: GateRecipe) -> list[Check]:
    """Coverage and recall: a model that leaves something out has low ones, however good each picture is."""
    found, before = report.neighbours, champion and champion.neighbours
    if found is None:
        if gate.min_coverage is None and before is None:
            return []
        words = "coverage and recall were not measured: raise evaluate.samples"
        return [Check(name="coverage", passed=False, words=words)]
    checks = []
    if gate.min_coverage is not None:
        limit = gate.min_coverage * found.coverage.real
        checks.append(_share("coverage", found.coverage, limit, f"{gate.min_coverage:g} of what real pictures score"))
    if before is None:
        return checks
    taught = report.teacher == champion.bundle_digest
    if unlike := differences(
        found.identity, before.identity, ignored=may_differ(report, champion), whose="the champion's"
    ):
        return [*checks, Check(name="coverage", passed=False, words=_unlike("coverage and recall", unlike))]
    kept = 1 - max(gate.max_coverage_loss, gate.max_student_excess if taught else 0)
    for name in ("coverage", "recall"):
        checks.append(_as_much(name, found.measured[name], before.measured[name], kept, gate.confidence))
    return checks


def _as_much(name: str, found: Measured, before: Measured, kept: float, confidence: float) -> Check:
    """Refused where the interval of (found - kept * before) lies below 0: a poor model's shares are near 0, and 0.006 is not
    told from 0.008 by 512 samples."""
    limit = kept * before.value
    error = math.hypot(found.standard_error, kept * before.standard_error)
    margin = NormalDist().inv_cdf((1 + confidence) / 2) * error
    passed = found.value + margin >= limit
    words = (
        f"{name} {found.value:.3f} against the champion's {before.value:.3f}: {'not ' if passed else ''}below {kept:g} of"
        f" that by more than {margin:.2g} (the half-width of the difference's {confidence:.0%} interval)"
    )
    return Check(name=name, passed=passed, words=words, value=found.value, limit=limit - margin)


def _share(name: str, found: Measured, limit: float, of_what: str) -> Check:
    passed = found.value >= limit
    words = f"{name} {found.value:.3f} is {'at least' if passed else 'below'} {of_what}"
    return Check(name=name, passed=passed, words=words, value=found.value, limit=limit)


def _restored(report: Report, champion: Report | None, gate: GateRecipe) -> list[Check]:
    if report.teacher or report.codec:
        return []  # they draw, and restore nothing
    least, ours = gate.min_restoration_gain, {task.identity.case: task for task in report.restoration}
    checks = []
    if least is not None:
        checks += [_gain(task, least) for task in ours.values()] or [_unmeasured("gate.min_restoration_gain is set")]
    for before in champion.restoration if champion else ():
        task = ours.get(before.identity.case)
        if task is None:
            checks.append(_unmeasured(f"the champion's {before.identity.case} was measured"))
        else:
            checks += _as_well(task, before, gate.max_restoration_loss)
    return checks


def _unmeasured(but: str) -> Check:
    words = f"{but}, and this model's restoration was not: evaluate it with evaluate.restoration_pictures above 0"
    return Check(name="restoration", passed=False, words=words)


def _unlike(what: str, unlike: tuple[str, ...]) -> str:
    return f"{what} cannot be held against the champion's ({'; '.join(unlike)}): evaluate both with one recipe"


def _gain(task: Restoration, least: float) -> Check:
    name = f"restoration, {task.identity.case}"
    if task.gain is None:
        words = f"{task.identity.case}: what it gains over {task.guess.name} is not finite"
        return Check(name=name, passed=False, words=words, limit=least)
    passed = task.gain >= least
    words = (
        f"{task.identity.case}: {task.gain:+.3g} dB to {task.guess.name}, {'at least' if passed else 'below'}"
        f" gate.min_restoration_gain={least:g}"
    )
    return Check(name=name, passed=passed, words=words, value=task.gain, limit=least)


def _as_well(task: Restoration, before: Restoration, loss: float) -> list[Check]:
    """Refused where the interval of the median difference lies below -loss.  The medians themselves differ by more than
    1 dB in one of the tasks of every fourth evaluation of one model under two noises."""
    name = f"restoration, {task.identity.case}"
    if unlike := differences(task.identity, before.identity, ignored=_AS_SERVED, whose="the champion's"):
        return [Check(name=name, passed=False, words=_unlike(task.identity.case, unlike))]
    if before.psnr is None:
        return []
    if task.psnr is None:
        words = f"{task.identity.case}: its PSNR is not finite, and the champion's is"
        return [Check(name=name, passed=False, words=words, limit=-loss)]
    if not before.each:
        again = "measured before each picture's was kept: evaluate and register the champion's run again"
        return [Check(name=name, passed=False, words=f"{task.identity.case}: the champion's PSNR was {again}")]
    middle, _, most = of_median(np.subtract(task.each, before.each))
    passed = not most < -loss  # of fewer than 6 pictures nothing is beyond doubt
    few = f"{len(task.each)} pictures are too few for an interval"
    reach = few if np.isnan(most) else f"{CONFIDENCE:.0%} interval up to {most:+.3g}"
    words = (
        f"{task.identity.case}: {task.psnr:.4g} dB against the champion's {before.psnr:.4g}, {middle:+.3g} picture by"
        f" picture ({reach}): {'not ' if passed else ''}beyond doubt lower by more than gate.max_restoration_loss={loss:g}"
    )
    return [Check(name=name, passed=passed, words=words, value=digits(most), limit=-loss)]


def _answers(latency: Latency, most: float) -> Check:
    passed = latency.full_p95 <= most
    words = (
        f"a picture takes {latency.full_p95:.3g} s with all {latency.slots} slots taken (95 of 100 requests take less; alone"
        f" {latency.alone_p95:.3g} s; {latency.device}): {'not ' if passed else ''}more than gate.max_latency_s={most:g}"
    )
    return Check(name="latency", passed=passed, words=words, value=latency.full_p95, limit=most)
