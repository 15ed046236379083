"""The report for people, in Markdown: each number with its interval, and beside it what it means."""

from typing import TYPE_CHECKING

from diffusion.evaluation.facts.agreement import agreement_words
from diffusion.evaluation.facts.by_class import class_words
from diffusion.evaluation.facts.neighbours import neighbour_words
from diffusion.evaluation.facts.restoration import restoration_words
from diffusion.evaluation.metrics.intervals import CONFIDENCE
from diffusion.evaluation.report.words_identity import identity_words
from diffusion.evaluation.report.words_memorization import memorization_words
from diffusion.store.averages import Reconstruction

if TYPE_CHECKING:
    from diffusion.evaluation.report.report import Report

_STUDENT = "the model is a student, which answers where its teacher's steps lead and not what is denoised"


def markdown(report: "Report") -> str:
    """The report for people."""
    parts = [
        f"# Evaluation of model {report.bundle_digest[:12]}",
        *(f"**Problem:** {problem}" for problem in report.problems),
        _summary(report),
        "![one row of samples per class](grid.png)",
        "The first samples of each class, none chosen. `real.png` shows real training pictures in the same places.",
        *_captions(report),
        *_distance(report),
        *neighbour_words(report),
        *class_words(report),
        *agreement_words(report),
        *memorization_words(report),
        *_losses(report),
        *_bound(report),
        *restoration_words(report),
        identity_words(report),
    ]
    return "\n\n".join(parts) + "\n"


def _summary(report: "Report") -> str:
    """The training run and what of it this is."""
    said = (
        f"{report.images_seen:,} images seen in training on dataset `{report.dataset_digest[:12]}`"
        f" ({len(report.classes)} classes); {average(report.ema, report.reconstruction)}."
    )
    if guide := report.guide:
        said += (
            f" Its guide is the same run at {guide.checkpoint.images_seen:,} images,"
            f" {average(guide.ema, guide.reconstruction)}."
        )
    if report.teacher:
        said += f" It is a few-step student of model {report.teacher[:12]}."
    if report.chosen_by:
        said += f" How it draws was chosen by sweep {report.chosen_by[:12]}."
    return said


def average(width: float, made: Reconstruction | None) -> str:
    """Which average of the weights, in words."""
    name = f"average of relative width {width:g}"
    if made is None:
        return name
    return f"{name}, put together from {len(made.checkpoints)} checkpoints ({made.error:.2%} of its profile is missed)"


def _captions(report: "Report") -> list[str]:
    if report.text is None:
        return []
    return [
        "The model reads captions: each sample was drawn with that of a training picture of its class, and each held-out"
        " loss is under the picture's own."
    ]


def _distance(report: "Report") -> list[str]:
    found, limit, least = report.frechet, report.frechet_limit, report.floor
    if found is None:
        return ["## Frechet distance", "Not measured: the model gave no pictures."]
    extractor = found.identity.extractor
    rows = [
        "| | Frechet distance | |",
        "|---|---|---|",
        f"| **this model** | **{found.value:.4g}** ± {found.standard_error:.2g} (standard error) |"
        f" {found.confidence:.0%} interval {found.low:.4g} to {found.high:.4g}; {found.identity.samples:,} samples"
        f" against {found.identity.reference_pictures:,} training pictures |",
    ]
    if limit:
        rows.append(
            f"| with ever more samples | {limit.value:.4g} ± {limit.standard_error:.2g} (standard error) |"
            f" {limit.confidence:.0%} interval {limit.low:.4g} to {limit.high:.4g}; from the spectrum that these samples"
            f" tell |"
        )
    if least:
        rows.append(
            f"| real pictures in its place | {least.value:.4g} ± {least.spread:.2g} (between splits) |"
            f" {least.pictures:,} training pictures against the {least.against:,} others |"
        )
    notes = (
        f"Lower is better, in features of {extractor.name} at {extractor.resolution} px. With finitely many samples the"
        f" distance is too large by about 1/N, so a perfect model scores near the last row, not 0; a model that"
        f" repeats training pictures may score below it. The standard error is a delete-block jackknife with"
        f" {found.blocks} blocks over the drawn samples; the real pictures are taken as given. Compare with distances"
        f" of equal identity only, never with published ones of another extractor, size or number of samples."
    )
    if found.identity.samples < found.identity.dimensions:
        notes += (
            f"\n\n**Few samples:** {found.identity.samples:,} pictures cannot show all variation in"
            f" {found.identity.dimensions:,} dimensions, and a model with too little of it is punished less than it"
            f" should be. Good for following one model and telling clear differences; raise `evaluate.samples` for more."
        )
    return ["## Frechet distance", "\n".join(rows), notes]


def _losses(report: "Report") -> list[str]:
    if not report.held_out:
        why = _STUDENT if report.teacher else "the dataset has no held-out pictures"
        return ["## Held-out loss", f"Not measured: {why}."]
    rows = [f"| sigma | loss | {CONFIDENCE:.0%} interval | network that answers 0 |", "|---|---|---|---|"]
    rows += [
        f"| {level.sigma:g} | {_shown(level.loss)} | {' to '.join(f'{end:.4g}' for end in level.interval or ()) or '-'} |"
        f" {_shown(level.zero)} |"
        for level in report.held_out
    ]
    notes = (
        f"Weighted denoising loss (EDM) on {'latents of ' if report.codec else ''}{report.held_out[0].pictures:,} pictures"
        f" that training never saw, with fixed"
        f" noise. The weight makes 1 the expected loss of a network that answers 0, where the pixels' mean square is"
        f" sigma_data squared; the last column is that loss on these very pictures. The interval is over pictures."
    )
    return ["## Held-out loss", "\n".join(rows), "![loss by noise level](loss.png)", notes]


def _bound(report: "Report") -> list[str]:
    found = report.bound
    if found is None:
        why = "evaluate.bound_steps is 0" if report.held_out else "the dataset has no held-out pictures"
        if report.codec:
            why = "the model draws latents, and a bound on these cannot be compared with one on pictures"
        if report.teacher:
            why = _STUDENT
        return ["## Variational bound", f"Not measured: {why}."]
    chain, error, interval = found.identity, "", "no interval"
    if found.standard_error is not None and found.low is not None:
        error = f" ± {_shown(found.standard_error, 2)} (standard error)"
        interval = f"{found.confidence:.0%} interval {_shown(found.low)} to {_shown(found.high)}"
    elif found.value is not None:
        interval += " of a single one"
    rows = [
        "| | bits per value | |",
        "|---|---|---|",
        f"| **this model** | **{_shown(found.value)}**{error} | {interval};"
        f" {chain.pictures:,} held-out picture{'s' * (chain.pictures > 1)} |",
        f"| its prior term | {_shown(found.prior, 2)} | what is left of a picture at sigma {chain.sigma_max:g} |",
        *(
            f"| its KL terms, sigma {part.sigma_from:.3g} to {part.sigma_to:.3g} | {_shown(part.bits, 3)} | |"
            for part in found.profile
        ),
        f"| its decoder | {_shown(found.decoder, 3)} | from sigma {chain.sigma_min:g} to one of 256 values |",
        f"| network that answers 0 | {_shown(found.zero)} | the same, as if pixels were independent and Gaussian |",
    ]
    notes = (
        f"Lower is better; 8 bits store a value as it is. In the mean over these pictures -log2 P(picture given class) of"
        f" the model as a chain of {chain.steps:,} ancestral steps, in equal steps of log-SNR and without guidance, is at"
        f" most this: it is not of the sampler that draws the pictures above, and says how much the model knows rather than"
        f" how they look. The KL terms are estimated without bias from {chain.draws:,} of {chain.steps - 1:,} steps for each"
        f" picture. The standard error is over pictures and takes the steps for drawn independently; they are spread"
        f" evenly, so that it errs to the safe side."
    )
    return ["## Variational bound", "\n".join(rows), "![the bound by noise level](bound.png)", notes]


def _shown(value: float | None, figures: int = 4) -> str:
    return "not finite" if value is None else f"{value:.{figures}g}"
