"""The report's words on identity: for each number what must be equal for it to be compared, the common parts once."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from diffusion.evaluation.identity import flat

if TYPE_CHECKING:
    from diffusion.evaluation.report.report import Report

Facts = dict[str, object]  # by name
_DRAWN = "drawn beside real pictures"


def identity_words(report: "Report") -> str:
    """The model, and then the numbers in groups: a row for each fact that a whole group shares, and one for each number with
    what is its own."""
    said: Facts = {"dataset_digest": report.dataset_digest, "seed": report.seed}
    parts = ["## Identity of the numbers", "\n".join(_rows("the model and where it was measured", _model(report)))]
    for title, numbers in _groups(report):
        if numbers:
            parts.append("\n".join(_rows(title, _group(numbers, said) | _real(report, title))))
    return "\n\n".join(parts)


def _model(report: "Report") -> Facts:
    facts: Facts = {
        "model (bundle)": report.bundle_digest,
        "training run": report.run_digest,
        "training recipe": report.recipe_digest,
        "dataset": report.dataset_digest,
        "average (EMA) width": report.ema,
    }
    if report.text:
        facts["text encoder"] = report.text
    if report.codec:
        facts["codec"] = report.codec
    for what, made in (("average", report.reconstruction), ("guide", report.guide and report.guide.reconstruction)):
        facts |= {
            f"{what} from the checkpoint at {c.images_seen:,}": c.digest for c in (made.checkpoints if made else ())
        }
    if report.guide:
        facts["guide"] = report.guide.checkpoint.digest
    return facts | {"seed": report.seed, "torch": report.environment.torch, "device": report.environment.device}


def _groups(report: "Report") -> Iterator[tuple[str, dict[str, Facts]]]:
    """(title, name of a number -> its identity, flat)."""
    drawn = {
        "Frechet distance": report.frechet,
        "Frechet distance with ever more samples": report.frechet_limit,
        "kernel distance": report.kernel,
        "precision, recall, density, coverage": report.neighbours,
        "each class by itself": report.by_class,
        "agreement with captions": report.agreement,
        "copies of training pictures": report.memorization,
    }
    found = {name: _flat(one.identity.model_dump()) for name, one in drawn.items() if one}
    if report.agreement:
        found["agreement with captions"] |= flat({"encoder": report.agreement.encoder.model_dump()})
    yield _DRAWN, found
    held_out: dict[str, Facts] = {}
    if report.bound:
        held_out["variational bound"] = _flat(report.bound.identity.model_dump())
    if report.held_out:
        held_out["held-out loss"] = {
            "metric": "denoising loss with EDM's weight",
            "dataset_digest": report.dataset_digest,
            "split": "holdout",
            "pictures": report.held_out[0].pictures,
            "sigma": ", ".join(f"{level.sigma:g}" for level in report.held_out),
            "seed": report.seed,
        }
    yield "held-out pictures", held_out
    yield "restoration", {task.identity.case: _flat(task.identity.model_dump()) for task in report.restoration}


def _real(report: "Report", title: str) -> Facts:
    """What real pictures score in the place of samples, of which the rest holds as well."""
    facts: Facts = {}
    if title == _DRAWN and (least := report.floor):
        facts["**Frechet distance of real pictures**"] = (
            f"samples {least.pictures} real ones, {least.splits} times; reference_pictures {least.against}"
        )
    if title == _DRAWN and (found := report.neighbours):
        facts["**precision, recall, density, coverage of real pictures**"] = (
            f"samples {found.real_pictures} real ones; reference_pictures {found.real_against}"
        )
    return facts


def _flat(identity: dict) -> Facts:
    """That of copies is around that of the samples."""
    return {name.removeprefix("sample."): value for name, value in flat(identity).items()}


def _group(numbers: dict[str, Facts], said: Facts) -> Facts:
    """The rows of some numbers.  said: what stands above already; it hears of what is common to these."""
    first, *others = numbers.values()
    common = {name: value for name, value in first.items() if all(name in o and o[name] == value for o in others)}
    again = {name for name, value in common.items() if name in said and said[name] == value}
    said |= common
    told = {name: value for name, value in common.items() if name not in again}
    if again:
        told["as above"] = ", ".join(dict.fromkeys(name.partition(".")[0] for name in common if name in again))
    rows = {name.replace(".", " "): value for name, value in told.items()}
    for number, facts in numbers.items():
        own = (f"{name.replace('.', ' ')} {value}" for name, value in facts.items() if name not in common)
        rows[f"**{number}**"] = "; ".join(own)
    return rows


def _rows(title: str, facts: Facts) -> list[str]:
    return [f"| {title} | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts.items())]
