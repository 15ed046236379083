"""Restoration in the report: each task with its identity and intervals, its pictures, and words for people."""

import math
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field

from diffusion.data.images import grid
from diffusion.evaluation.extractors.features import ExtractorIdentity
from diffusion.evaluation.gathered import Gathered
from diffusion.evaluation.metrics.intervals import CONFIDENCE, digits, half_width
from diffusion.evaluation.restoration import EXACT, Case, case_of, steps_of
from diffusion.recipe import Frozen, unset
from diffusion.restore import REPEATS
from diffusion.spacing import DETAIL

if TYPE_CHECKING:
    from diffusion.evaluation.report.report import Report

_FIGURES = tuple(f"{prefix}{name}" for prefix in ("", "guess_") for name in ("psnr", "ssim", "distance", "consistency"))

_ANY = (-math.inf, math.inf)  # a range


class RestorationIdentity(Frozen):
    """What must be equal for two restorations to be compared: everything but the model."""

    metric: Literal["restoration/1"] = "restoration/1"
    dataset_digest: str
    split: Literal["holdout"] = "holdout"
    pictures: int
    which: Literal["those that have colour"] | None = Field(None, exclude_if=unset)  # None: all that were looked at
    case: str
    way: Literal["zero-shot", "trained"]
    sampler: str
    steps: int
    repeats: int  # of each stretch of the way
    sigma_min: float
    sigma_max: float
    condition: Literal["each picture's own, no guidance"] = "each picture's own, no guidance"
    extractor: ExtractorIdentity
    seed: int


class Guess(Frozen):
    """What is had without a model, on the same pictures."""

    name: str
    psnr: float | None
    ssim: float | None
    distance: float | None
    consistency: float | None


class Restoration(Frozen):
    """How near restored pictures are to the true ones, with the intervals over pictures.  None: not finite, or there are
    too few pictures (an interval of a median needs 6), or they are too small for an SSIM (11 pixels)."""

    identity: RestorationIdentity
    confidence: float
    psnr: float | None = Field(description="Median, dB; a picture that equals the truth counts 100")
    psnr_low: float | None
    psnr_high: float | None
    each: tuple[float | None, ...] = Field(
        (), exclude_if=unset, description="PSNR of every picture, dB: two models' are compared picture by picture"
    )
    gain: float | None = Field(description="Median of the differences to the guess's PSNR, dB")
    gain_low: float | None
    gain_high: float | None
    ssim: float | None = Field(description="Mean")
    ssim_low: float | None
    ssim_high: float | None
    distance: float | None = Field(description="Mean distance of the extractor's features from the true picture's")
    distance_low: float | None
    distance_high: float | None
    consistency: float | None = Field(
        description="Largest ||A x - y|| / sqrt(dim y) before rounding; white less black is 2"
    )
    guess: Guess

    @classmethod
    def of(cls, figures: dict[str, np.ndarray], case: Case, identity: RestorationIdentity) -> "Restoration":
        """figures: those of `fidelity`, and of the guess {"guess_psnr", ...}, of all pictures."""
        found: dict[str, float | None] = {}
        for name, values, interval, (least, most) in (
            ("psnr", figures["psnr"], of_median, _ANY),
            ("gain", figures["psnr"] - figures["guess_psnr"], of_median, _ANY),
            ("ssim", figures["ssim"], of_mean, (-1.0, 1.0)),
            ("distance", figures["distance"], of_mean, (0.0, math.inf)),
        ):
            middle, *ends = interval(values)
            low, high = (digits(float(np.clip(end, least, most))) for end in ends)
            found |= {name: digits(middle), f"{name}_low": low, f"{name}_high": high}
        guess = Guess(
            name=case.guessed,
            psnr=digits(float(np.median(figures["guess_psnr"]))),
            ssim=digits(float(figures["guess_ssim"].mean())),
            distance=digits(float(figures["guess_distance"].mean())),
            consistency=digits(float(figures["guess_consistency"].max())),
        )
        consistency = digits(float(figures["consistency"].max()))
        each = tuple(digits(float(value)) for value in figures["psnr"])
        return cls(identity=identity, confidence=CONFIDENCE, each=each, consistency=consistency, guess=guess, **found)

    def metrics(self) -> dict[str, float | None]:
        """Name -> value, for a tracker."""
        names = [f"{name}{end}" for name in ("psnr", "gain", "ssim", "distance") for end in ("", "_low", "_high")]
        prefix = f"restoration_{self.identity.case.replace(' ', '_').replace('-', '_')}"
        return {f"{prefix}_{name}": getattr(self, name) for name in names}


def of_mean(values: np.ndarray) -> tuple[float, float, float]:
    """The mean of values (N,) and its interval of CONFIDENCE, by Student's t.  NaN where one is not finite."""
    n, mean = len(values), float(values.mean())
    half = half_width(float(values.std(ddof=1)) / math.sqrt(n), n - 1) if n > 1 else math.nan
    return mean, mean - half, mean + half


def of_median(values: np.ndarray) -> tuple[float, float, float]:
    """The median of values (N,) and its interval of at least CONFIDENCE, whatever their distribution is: between the k-th
    least and the k-th largest, the largest k for which a fair coin shows fewer than k heads in N throws seldom enough.  NaN
    where one is not finite."""
    if not np.isfinite(values).all():
        return math.nan, math.nan, math.nan
    n, ordered = len(values), np.sort(values)
    k, below = 0, 0.5**n
    while below <= (1 - CONFIDENCE) / 2:
        k += 1
        below += math.comb(n, k) * 0.5**n
    low, high = (float(ordered[k - 1]), float(ordered[n - k])) if k else (math.nan, math.nan)
    return float(np.median(values)), low, high


def restoration_of(gathered: Gathered) -> tuple[Restoration, ...]:
    """One for each task that was measured; of colouring on the pictures that have colour, if any does: a grey one is right
    as it is, so that a model could only lose, and a share of such pictures would move every number."""
    if gathered.problems:
        return ()
    parts: dict[str, list[dict[str, np.ndarray]]] = {}
    for task, result in gathered.of("restore"):
        parts.setdefault(task.case, []).append(result.arrays)
    found = []
    for name, arrays in parts.items():
        figures = {key: np.concatenate([part[key] for part in arrays]) for key in _FIGURES}
        case = case_of(name, gathered.spec.size)
        if case.task == "colorization":
            coloured = figures["guess_psnr"] < EXACT
            figures = {key: values[coloured] for key, values in figures.items()}
        if len(figures["psnr"]):
            found.append(Restoration.of(figures, case, _identity(gathered, case, len(figures["psnr"]))))
    return tuple(found)


def _identity(gathered: Gathered, case: Case, pictures: int) -> RestorationIdentity:
    spec, sampling = gathered.spec, gathered.spec.sampling
    trained = case.task in spec.degradations
    return RestorationIdentity(
        dataset_digest=gathered.manifest.digest,
        pictures=pictures,
        which="those that have colour" if case.task == "colorization" else None,
        case=case.name,
        way="trained" if trained else "zero-shot",
        sampler=sampling.sampler if trained else "ddnm+",
        steps=steps_of(case.task, spec),
        repeats=1 if trained else REPEATS,
        sigma_min=min(sampling.sigma_min, DETAIL),
        sigma_max=sampling.sigma_max,
        extractor=gathered.setup.extractor,
        seed=gathered.recipe.seed,
    )


def restoration_picture(gathered: Gathered) -> dict[str, np.ndarray]:
    """{"restoration": grid} of the first pictures: what was given and what was made of it in each task, below them all the
    true ones; {} where nothing was restored."""
    if gathered.problems:
        return {}
    rows: dict[str, tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]] = {}
    for task, result in gathered.of("restore"):
        for i, picture in enumerate(result.pictures):
            rows.setdefault(task.case, ([], [], []))[i % 3].append(picture)
    if not rows:
        return {}
    cells = [picture for given, made, _ in rows.values() for picture in (*given, *made)]
    true = next(true for _, _, true in rows.values())
    labels = [label for case in rows for label in (case, "restored")]
    return {"restoration": grid([*cells, *true], len(true), [*labels, "true"])}


def restoration_words(report: "Report") -> list[str]:
    """The section of the report for people."""
    if not report.restoration:
        why = "the model gave no pictures" if report.problems else "evaluate.restoration_pictures is 0"
        if report.codec or report.teacher:
            why = "the model draws " + (
                "latents" if report.codec else "as its teacher's steps lead, and restores nothing"
            )
        elif not report.held_out:
            why = "the dataset has no held-out pictures"
        return ["## Restoration", f"Not measured: {why}."]
    rows = [
        "| | PSNR, dB | gain, dB | SSIM | feature distance | off the measurement |",
        "|---|---|---|---|---|---|",
    ]
    for found in report.restoration:
        identity, guess = found.identity, found.guess
        repeats = f", {identity.repeats} times" if identity.repeats > 1 else ""
        rows += [
            f"| **{identity.case}**, {identity.way} in {identity.steps} steps{repeats} | **{_shown(found.psnr)}**"
            f" ({_shown(found.psnr_low)} to {_shown(found.psnr_high)}) | **{_shown(found.gain)}**"
            f" ({_shown(found.gain_low)} to {_shown(found.gain_high)}) | {_shown(found.ssim)} ({_shown(found.ssim_low)} to"
            f" {_shown(found.ssim_high)}) | {_shown(found.distance)} ({_shown(found.distance_low)} to"
            f" {_shown(found.distance_high)}) | {_shown(found.consistency, 1)} |",
            f"| {guess.name}, without a model | {_shown(guess.psnr)} | | {_shown(guess.ssim)} | {_shown(guess.distance)} |"
            f" {_shown(guess.consistency, 1)} |",
        ]
    first, last = report.restoration[0], report.restoration[-1]
    coloured = ""
    if last.identity.which and last.identity.pictures < (most := first.identity.pictures):
        coloured = f" Of colorization the {last.identity.pictures:,} of {most:,} are meant that have colour."
    notes = (
        f"{first.identity.pictures:,} held-out pictures, each restored under its own class and caption without guidance, as"
        f" `diffusion restore` does it; in brackets {first.confidence:.0%} intervals over pictures. PSNR is the median (a"
        f" picture that equals the truth counts {EXACT:g}), the gain that of its differences to the way without a model on"
        f" the same pictures, SSIM (higher is better) and the distance of the features (lower is better) are means; the last"
        f" column is the largest root mean square of A x - y before rounding, white less black being 2.{coloured}"
    )
    return ["## Restoration", "\n".join(rows), "![given, restored and true pictures](restoration.png)", notes]


def _shown(value: float | None, figures: int = 3) -> str:
    return "-" if value is None else f"{value:.{figures}g}"
