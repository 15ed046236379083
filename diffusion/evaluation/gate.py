"""The gate: whether a model may become the champion, and why."""

import math

from diffusion.evaluation.distance import Frechet
from diffusion.evaluation.report import Report
from diffusion.evaluation.stats import t_quantile
from diffusion.recipe import Frozen, GateRecipe


class Verdict(Frozen):
    """`reasons` speak for people: of a refusal each one that holds, of a pass what was found."""

    passed: bool
    reasons: tuple[str, ...]


def verdict(challenger: Report, champion: Report | None, gate: GateRecipe) -> Verdict:
    """Whether `challenger` may take the place of `champion` (None: there is none yet).

    It must be sane: every number finite, the held-out loss (a student has none) below gate.max_loss at every noise level,
    the Frechet distance at most gate.max_frechet where that is set.  Beside a champion it must also be better beyond
    doubt: on equal metric identities, its Frechet distance lower by more than t * sqrt(se^2 + se_champion^2), where t is
    Student's for a two-sided interval of gate.confidence: so that the interval of the difference lies below 0 as a whole.

    A student is compared with its teacher, though they draw otherwise, that being its purpose: its distance must beyond
    doubt be below 1 + gate.max_student_excess times the teacher's.
    """
    if faults := faults_of(challenger, gate):
        return Verdict(passed=False, reasons=faults)
    largest = max((level.loss for level in challenger.held_out), default=None)
    losses = "" if largest is None else f" the held-out loss at most {largest:.3g} (limit {gate.max_loss:g}),"
    sane = f"sane: every number is finite,{losses} Frechet distance {challenger.frechet.value:.4g}"
    if champion is None:
        return Verdict(passed=True, reasons=(sane, "there was no champion to compare it with"))
    if challenger.bundle_digest == champion.bundle_digest:
        return Verdict(passed=True, reasons=(sane, "it is the champion itself"))
    if champion.frechet is None:
        unknown = "the champion has no Frechet distance to be compared with: evaluate and register its run again"
        return Verdict(passed=False, reasons=(unknown,))
    taught = challenger.teacher == champion.bundle_digest
    if unlike := differences(challenger, champion, ignored="sampling." if taught else None):
        again = (
            "numbers of unlike identity are not compared: evaluate and register the champion's run again with the"
            " present recipe, or this one with the champion's"
        )
        return Verdict(passed=False, reasons=(*unlike, again))
    if taught:
        return _compare_with_teacher(challenger.frechet, champion.frechet, gate, sane)
    return _compare(challenger.frechet, champion.frechet, gate, sane)


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


def differences(a: Report, b: Report, *, ignored: str | None = None) -> tuple[str, ...]:
    """What keeps the Frechet distances of two reports from being compared, one line for each differing field.  ignored: how
    the names of those begin that may differ."""
    assert a.frechet is not None
    assert b.frechet is not None
    here, there = _flat(a.frechet.identity.model_dump()), _flat(b.frechet.identity.model_dump())
    return tuple(
        f"{name} is {here.get(name)} here and {there.get(name)} in the champion's report"
        for name in sorted(here.keys() | there.keys())
        if here.get(name) != there.get(name) and not (ignored and name.startswith(ignored))
    )


def _compare(challenger: Frechet, champion: Frechet, gate: GateRecipe, sane: str) -> Verdict:
    margin = _margin(challenger, champion, gate)
    gain = champion.value - challenger.value
    passed = gain > margin
    numbers = (
        f"Frechet distance {challenger.value:.4g} against the champion's {champion.value:.4g}:"
        f" {abs(gain):.3g} {'lower' if gain > 0 else 'higher'}, {'' if passed else 'not '}lower by more than"
        f" {margin:.3g} (the half-width of the difference's {gate.confidence:.0%} interval)"
    )
    return Verdict(passed=passed, reasons=(sane, numbers) if passed else (numbers,))


def _compare_with_teacher(student: Frechet, teacher: Frechet, gate: GateRecipe, sane: str) -> Verdict:
    allowed = 1 + gate.max_student_excess
    margin = _margin(student, teacher, gate, times=allowed)
    passed = student.value + margin < allowed * teacher.value
    numbers = (
        f"Frechet distance {student.value:.4g} in {student.identity.sampling.steps} steps against"
        f" {teacher.value:.4g} of the champion, its teacher, in {teacher.identity.sampling.steps}:"
        f" {'' if passed else 'not '}below {allowed:g} times that by more than {margin:.3g} (the half-width of the"
        f" difference's {gate.confidence:.0%} interval)"
    )
    return Verdict(passed=passed, reasons=(sane, numbers) if passed else (numbers,))


def _margin(a: Frechet, b: Frechet, gate: GateRecipe, times: float = 1.0) -> float:
    """Half the width of the interval of a - times b."""
    error = math.hypot(a.standard_error, times * b.standard_error)
    return t_quantile((1 + gate.confidence) / 2, min(a.blocks, b.blocks) - 1) * error


def _flat(value: dict, prefix: str = "") -> dict[str, object]:
    """Nested dicts as one, with dotted names."""
    flat: dict[str, object] = {}
    for name, inner in value.items():
        flat |= _flat(inner, f"{prefix}{name}.") if isinstance(inner, dict) else {prefix + name: inner}
    return flat
