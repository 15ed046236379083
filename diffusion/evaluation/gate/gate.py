"""The gate: whether a model may become the champion, and why."""

from diffusion.evaluation.facts.distance import Frechet
from diffusion.evaluation.gate.limits import limits_of, may_differ
from diffusion.evaluation.gate.verdict import Check, Verdict
from diffusion.evaluation.identity import check_alike, differences
from diffusion.evaluation.metrics.intervals import half_width, jackknife_error
from diffusion.evaluation.report.report import Report
from diffusion.recipe import GateRecipe, digest_of
from diffusion.serving.latency import Latency


def verdict(
    challenger: Report,
    champion: Report | None,
    gate: GateRecipe,
    *,
    against: str | None = None,
    anew: tuple[str, ...] = (),
    withdrawn: str | None = None,
    latency: Latency | None = None,
) -> Verdict:
    """Whether `challenger` may take the place of `champion` (None: there is none yet).

    champion: of the same bundle it is the report before this one; what changed is said, and nothing is refused for it.
    against: the champion's version.  anew: what differs in the champion's own report, where this one is of another
    measurement, made to be compared.  withdrawn: for what `diffusion rollback` withdrew the challenger, if it did: then it
    stays so, whatever its numbers are.  latency: how long its pictures take, where gate.max_latency_s asks for it.

    It must be sane: every number finite, the held-out loss (a student has none) below gate.max_loss at every noise level,
    the Frechet distance at most gate.max_frechet where that is set.  Beside a champion it must also be better beyond
    doubt: on equal metric identities, the interval of gate.confidence of (its Frechet distance - (1 + gate.max_excess) times
    the champion's) must lie below 0 as a whole.  So a model that is as good as that allows passes with a probability of
    (1 - gate.confidence) / 2, and with gate.max_excess = 0 that is how often noise moves the alias.

    A student is compared with its teacher, though they draw otherwise, that being its purpose, and may be worse by
    gate.max_student_excess instead.  So are models of which one draws as a sweep chose: each as it is served.  And it must
    keep the limits of `limits.limits_of`, better or not.
    """
    checks = _sane(challenger, gate)
    if all(check.passed for check in checks):
        if anew:
            words = f"the champion was measured again, as this one was: {'; '.join(anew)}"
            checks.append(Check(name="champion", passed=True, words=words))
        checks += _beside(challenger, champion, gate)
        checks += limits_of(challenger, champion, gate, latency)
    if withdrawn is not None:
        words = f"`diffusion rollback` withdrew it {withdrawn}, and with --to it brings it back"
        checks.append(Check(name="withdrawn", passed=False, words=words))
    return Verdict(checks=tuple(checks), against=against, gate=digest_of(gate))


def _beside(challenger: Report, champion: Report | None, gate: GateRecipe) -> list[Check]:
    """What it must show beside the champion."""
    if champion is None:
        return [Check(name="champion", passed=True, words="there was no champion to compare it with")]
    if challenger.bundle_digest == champion.bundle_digest:
        return [Check(name="champion", passed=True, words=f"it is the champion itself{_anew(challenger, champion)}")]
    if champion.frechet is None:
        unknown = "the champion has no Frechet distance to be compared with: evaluate and register its run again"
        return [Check(name="frechet", passed=False, words=unknown)]
    taught = challenger.teacher == champion.bundle_digest
    ignored = may_differ(challenger, champion)
    here, there = challenger.frechet.identity, champion.frechet.identity
    if unlike := differences(here, there, ignored=ignored, whose="the champion's"):
        again = (
            "numbers of unlike identity are not compared: give a model of other classes or another size a --name of its own,"
            " or serve it by its version; else evaluate it with the champion's recipe"
        )
        return [Check(name="identity", passed=False, words=words) for words in (*unlike, again)]
    return [_compare(challenger.frechet, champion.frechet, gate, ignored=ignored, taught=taught)]


def _anew(report: Report, former: Report) -> str:
    """What another measurement of the same model has changed in its numbers; nothing where there is none."""
    if report == former:
        return ""
    if former.frechet is None:
        return f", measured anew: Frechet distance {report.frechet.value:.4g}, which was not measured before"
    told = differences(report.frechet.identity, former.frechet.identity, whose="its former")
    told += (f"Frechet distance {report.frechet.value:.4g}, was {former.frechet.value:.4g}",)
    return f", measured anew: {'; '.join(told)}"


def _sane(report: Report, gate: GateRecipe) -> list[Check]:
    """Why a model is not fit to serve, whatever else there is; one check that passes if it is."""
    if faults := faults_of(report, gate):
        return [Check(name="sane", passed=False, words=fault) for fault in faults]
    largest = max((level.loss for level in report.held_out), default=None)
    losses = "" if largest is None else f" the held-out loss at most {largest:.3g} (limit {gate.max_loss:g}),"
    words = f"sane: every number is finite,{losses} Frechet distance {report.frechet.value:.4g}"
    return [Check(name="sane", passed=True, words=words, value=largest, limit=gate.max_loss)]


def faults_of(report: Report, gate: GateRecipe) -> tuple[str, ...]:
    """Why a model is not fit to serve, whatever else there is; empty if it is."""
    faults = [f"the model gives no pictures: {problem}" for problem in report.problems]
    if report.frechet is None:
        faults.append("its Frechet distance was not measured")
    elif gate.max_frechet is not None and report.frechet.value > gate.max_frechet:
        faults.append(f"its Frechet distance {report.frechet.value:.4g} is above gate.max_frechet={gate.max_frechet:g}")
    if not report.held_out and report.teacher is None:
        faults.append("its held-out loss was not measured: shard with shard.holdout above 0")
    for level in report.held_out:
        if level.loss is None:
            faults.append(f"its held-out loss at sigma {level.sigma:g} is not finite")
        elif level.loss >= gate.max_loss:
            faults.append(
                f"its held-out loss {level.loss:.3g} at sigma {level.sigma:g} is not below"
                f" gate.max_loss={gate.max_loss:g}"
            )
    return tuple(faults)


def _compare(challenger: Frechet, champion: Frechet, gate: GateRecipe, *, ignored: str | None, taught: bool) -> Check:
    check_alike(challenger.identity, champion.identity, ignored=ignored)
    excess = gate.max_student_excess if taught else gate.max_excess
    allowed = 1 + excess
    limit = allowed * champion.value
    pairs = zip(challenger.left_out, champion.left_out, strict=True)
    error = jackknife_error([one - allowed * other for one, other in pairs])
    margin = half_width(error, challenger.blocks - 1, gate.confidence)
    gain = limit - challenger.value
    passed = gain > margin
    who = f"the champion's {champion.value:.4g}"
    steps = ""
    if taught:
        who = f"{champion.value:.4g} of the champion, its teacher, in {champion.identity.sampling.steps}"
        steps = f" in {challenger.identity.sampling.steps} steps"
    elif challenger.identity.sampling != champion.identity.sampling:
        who += f" ({_drawn(champion)})"
        steps = f" ({_drawn(challenger)})"
    if excess:
        found = f"{'' if passed else 'not '}below {allowed:g} times that by more than {margin:.3g}"
    else:
        way = "lower" if gain > 0 else "higher"
        found = f"{abs(gain):.3g} {way}, {'' if passed else 'not '}lower by more than {margin:.3g}"
    words = (
        f"Frechet distance {challenger.value:.4g}{steps} against {who}: {found} (the half-width of the difference's"
        f" {gate.confidence:.0%} interval)"
    )
    return Check(name="frechet", passed=passed, words=words, value=challenger.value, limit=limit - margin)


def _drawn(found: Frechet) -> str:
    how = found.identity.sampling
    return f"{how.sampler}, {how.steps} steps, guidance {how.guidance:g}"
