"""Limits that a model must keep whatever its Frechet distance: it shows what the champion shows, repeats no training
pictures, restores as well, and answers in time."""

from diffusion.evaluation.identity import differences
from diffusion.evaluation.neighbours import Measured
from diffusion.evaluation.report import Report
from diffusion.evaluation.restoration_facts import Restoration
from diffusion.evaluation.verdict import Check
from diffusion.recipe import GateRecipe
from diffusion.serving.latency import Latency


def limits_of(report: Report, champion: Report | None, gate: GateRecipe, latency: Latency | None) -> list[Check]:
    """A check for each limit that is set and whose number was measured.

    What is held against the champion's numbers is so where these are of equal identity, and of another model.
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
    found = report.neighbours
    if found is None:
        return []
    checks = []
    if gate.min_coverage is not None:
        limit = gate.min_coverage * found.coverage.real
        checks.append(_share("coverage", found.coverage, limit, f"{gate.min_coverage:g} of what real pictures score"))
    before = champion and champion.neighbours
    if before is None:
        return checks
    taught = report.teacher == champion.bundle_digest
    if differences(found.identity, before.identity, ignored=may_differ(report, champion)):
        return checks
    kept = 1 - max(gate.max_coverage_loss, gate.max_student_excess if taught else 0)
    for name in ("coverage", "recall"):
        theirs = before.measured[name].value
        checks.append(_share(name, found.measured[name], kept * theirs, f"{kept:g} of the champion's {theirs:.3f}"))
    return checks


def _share(name: str, found: Measured, limit: float, of_what: str) -> Check:
    passed = found.value >= limit
    words = f"{name} {found.value:.3f} is {'at least' if passed else 'below'} {of_what}"
    return Check(name=name, passed=passed, words=words, value=found.value, limit=limit)


def _restored(report: Report, champion: Report | None, gate: GateRecipe) -> list[Check]:
    theirs = {task.identity.case: task for task in champion.restoration} if champion else {}
    checks = []
    for task in report.restoration:
        least = gate.min_restoration_gain
        if least is not None and task.gain is not None:
            checks.append(_gain(task, least))
        before = theirs.get(task.identity.case)
        if before is not None and not differences(task.identity, before.identity):
            checks += _as_well(task, before, gate.max_restoration_loss)
    return checks


def _gain(task: Restoration, least: float) -> Check:
    name, passed = f"restoration, {task.identity.case}", task.gain >= least
    words = (
        f"{task.identity.case}: {task.gain:+.3g} dB to {task.guess.name}, {'at least' if passed else 'below'}"
        f" gate.min_restoration_gain={least:g}"
    )
    return Check(name=name, passed=passed, words=words, value=task.gain, limit=least)


def _as_well(task: Restoration, before: Restoration, loss: float) -> list[Check]:
    if task.psnr is None or before.psnr is None:
        return []
    limit = before.psnr - loss
    name, passed = f"restoration, {task.identity.case}", task.psnr >= limit
    words = (
        f"{task.identity.case}: {task.psnr:.4g} dB against the champion's {before.psnr:.4g},"
        f" {'not ' if passed else ''}lower by more than gate.max_restoration_loss={loss:g}"
    )
    return [Check(name=name, passed=passed, words=words, value=task.psnr, limit=limit)]


def _answers(latency: Latency, most: float) -> Check:
    passed = latency.full_p95 <= most
    words = (
        f"a picture takes {latency.full_p95:.3g} s with all {latency.slots} slots taken (95 of 100 requests take less; alone"
        f" {latency.alone_p95:.3g} s; {latency.device}): {'not ' if passed else ''}more than gate.max_latency_s={most:g}"
    )
    return Check(name="latency", passed=passed, words=words, value=latency.full_p95, limit=most)
