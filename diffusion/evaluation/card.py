"""The model card: what a person must know of a registered model before using it, in Markdown.  [Mitchell et al. 2019]"""

from collections.abc import Mapping
from dataclasses import dataclass

from diffusion.data.manifest import Manifest
from diffusion.evaluation.gate.verdict import Verdict
from diffusion.evaluation.gate.verdict import markdown as verdict_page
from diffusion.evaluation.report.report import Report
from diffusion.evaluation.report.words_identity import identity_words
from diffusion.store.bundle_spec import BundleSpec
from diffusion.store.refs import DatasetRef

FILE = "card.md"
_PICTURES = {  # of a report, for people
    "grid.png": "The first samples of each class, none chosen.",
    "real.png": "Real training pictures in the same places.",
    "nearest.png": "Drawn pictures beside the training pictures they are nearest to.",
    "restoration.png": "Held-out pictures: what was left of them, what the model made of that, and the truth.",
    "loss.png": "The held-out loss by noise level.",
    "bound.png": "The variational bound by noise level.",
}
_MOST_CLASSES = 40  # named in a sentence
_BESIDE = ("_low", "_high", "_standard_error", "_real", "_floor")  # names of numbers that belong to another


@dataclass(frozen=True)
class DataFacts:
    """What is known of the data that a model was trained on."""

    ref: DatasetRef
    manifest: Manifest | None = None  # None: not within reach
    source: str | None = None  # URI, where the data root still says
    licence: str | None = None  # None: nobody said


@dataclass(frozen=True)
class Training:
    """What MLflow has of the run that trained it."""

    run_id: str
    recipe: Mapping[str, str]  # parameter -> value


def card(
    name: str,
    report: Report,
    spec: BundleSpec,
    verdict: Verdict,
    data: DataFacts,
    *,
    training: Training | None = None,
    pictures: tuple[str, ...] = (),
) -> str:
    """The whole card.  training: None where this MLflow does not know the run.  pictures: files that lie beside it."""
    shown = [f"![{words}]({file})\n\n{words}" for file, words in _PICTURES.items() if file in pictures]
    parts = [
        f"# {name}: model {report.bundle_digest[:12]}",
        what_it_is(spec),
        *shown[:1],
        "## Intended use",
        _use(name, spec),
        "## How the gate judged it",
        verdict_page(verdict).strip(),
        "## Data",
        _data(data),
        "## Training",
        _training(spec, training),
        "## Metrics",
        _metrics(report),
        *shown[1:],
        "## Limits",
        _limits(report, spec, data),
        "## Where it comes from",
        _lineage(spec, report),
        identity_words(report),
    ]
    return "\n\n".join(parts) + "\n"


def summary(
    report: Report, spec: BundleSpec, verdict: Verdict, data: DataFacts, *, where: str, longest: int = 5_000
) -> str:
    """The card in short, of at most `longest` characters.  where: the whole one is, for people."""
    reasons = "".join(f"- {reason}\n" for reason in verdict.reasons)
    text = "\n\n".join(
        (
            what_it_is(spec),
            f"The gate {'passed' if verdict.passed else 'refused'} it:\n{reasons}".rstrip(),
            f"{data.ref.images:,} pictures (dataset {data.ref.digest[:12]}), their licence: {_licence(data)}",
            _table(report.metrics()),
        )
    )
    end = f"\n\nThe whole card: {where}"
    room = longest - len(end)
    return (text if len(text) <= room else f"{text[: room - 2]} …") + end


def what_it_is(spec: BundleSpec) -> str:
    """What a bundle draws, and how."""
    guide, sampling = spec.guide, spec.sampling
    behind = f", from itself after {guide.checkpoint.images_seen:,} images" if guide else ""
    sizes = ", ".join(f"{width} x {height}" for height, width in spec.sizes or (spec.size,))
    said = [
        f"Draws {sizes} pictures of {len(spec.classes)} classes ({_named(spec.classes)})"
        f"{', and from prompts' if spec.text else ''}.",
        f"{spec.parameters / 1e6:.2f} M parameters, average of relative width {spec.ema:g} after"
        f" {spec.images_seen:,} images seen.",
        f"By default {sampling.sampler}, {sampling.steps} steps, guidance {sampling.guidance:g}"
        f" ({sampling.guidance_kind}{behind}).",
    ]
    if spec.codec:
        said.append(f"Its latents become pictures by the codec {spec.codec}.")
    if spec.degradations:
        said.append(f"It was trained to restore: {', '.join(spec.degradations)}.")
    if spec.lesson:
        said.append(f"A few-step student of the bundle {spec.lesson.teacher}.")
    return " ".join(said)


def _named(classes: tuple[str, ...]) -> str:
    more = len(classes) - _MOST_CLASSES
    return ", ".join(map(_cell, classes[:_MOST_CLASSES])) + (f" and {more:,} more" if more > 0 else "")


def _use(name: str, spec: BundleSpec) -> str:
    label = spec.classes[0]
    return (
        "Drawing pictures like those it was trained on, of these classes and sizes; without further training also"
        " restoring and editing pictures. Not for telling what is true: what it fills in is likely, not right, and must"
        " not serve as evidence, diagnosis or identification.\n\n"
        f"    diffusion sample --name {name} --label '{label}' --n 8\n"
        f"    diffusion deploy --name {name}\n\n"
        f'    mlflow.pyfunc.load_model("models:/{name}@champion")'
        f'.predict(pandas.DataFrame({{"label": ["{label}"], "seed": [7]}}))\n\n'
        "These take the champion; `--model challenger`, or a version's number, takes another. Every picture carries a"
        " receipt: `diffusion trace picture.png` leads back to the data, `diffusion replay picture.png` draws it again."
    )


def _data(data: DataFacts) -> str:
    ref, made = data.ref, data.manifest
    rows = [
        ("dataset", f"`{ref.digest}`"),
        ("licence", _licence(data)),
        ("source", f"`{data.source}`" if data.source else "not known where it was registered"),
        ("training pictures", f"{ref.images:,}"),
        ("held out", f"{ref.holdout:,}, which training never saw"),
        ("set aside", f"{sum(made.set_aside.values()) if made else ref.rejected:,}{_reasons(made)}"),
    ]
    if made is not None:
        done = made.processing
        rows.append(
            (
                "processing",
                f"{done.crop} crop, {done.resize} to {made.resolution} px, on {done.background}, {done.encoding}",
            )
        )
        counts = zip(made.classes, made.train_counts, made.holdout_counts, strict=True)
        classes = ["| class | training | held out |", "|---|---|---|"]
        classes += [f"| {_cell(name)} | {train:,} | {held:,} |" for name, train, held in counts]
        return _rows(rows) + "\n\n" + "\n".join(classes)
    return _rows(rows) + "\n\nIts manifest was not within reach, so that the classes' numbers are not here."


def _licence(data: DataFacts) -> str:
    if data.licence is None:
        return "unknown: nobody stated it (`--set data_licence=...`)"
    return _cell(data.licence)


def _reasons(made: Manifest | None) -> str:
    found = ", ".join(f"{_cell(kind)} {count:,}" for kind, count in sorted(made.set_aside.items())) if made else ""
    return f" ({found})" if found else ""


def _training(spec: BundleSpec, training: Training | None) -> str:
    said = f"{spec.images_seen:,} images seen; recipe `{spec.recipe_digest}`, in {spec.precision}."
    if spec.init:
        said += f" It started from the weights of the model `{spec.init}`."
    if training is None:
        return f"{said} This MLflow does not know the run."
    values = sorted(training.recipe.items())
    return f"{said} MLflow's run {training.run_id} has its curves and `recipe.json`.\n\n" + _rows(
        [(key, f"`{_cell(value)}`") for key, value in values]
    )


def _metrics(report: Report) -> str:
    confidence = f"{report.frechet.confidence:.0%} " if report.frechet else ""
    return (
        _table(report.metrics())
        + f"\n\nThe interval is the {confidence}one over samples of that size; `report.md` says what each number means,"
        " and under what identity, below, it may be compared: never with a published one of another extractor, size or"
        " number of samples."
    )


def _table(metrics: Mapping[str, float]) -> str:
    rows = ["| metric | value | interval | real pictures |", "|---|---|---|---|"]
    for name, value in metrics.items():
        if any(name.endswith(end) and name.removesuffix(end) in metrics for end in _BESIDE):
            continue
        low, high = metrics.get(f"{name}_low"), metrics.get(f"{name}_high")
        real = metrics.get(f"{name}_real", metrics.get(f"{name}_floor"))
        interval = "" if low is None or high is None else f"{low:.4g} to {high:.4g}"
        rows.append(f"| {name} | {value:.4g} | {interval} | {'' if real is None else f'{real:.4g}'} |")
    return "\n".join(rows)


def _limits(report: Report, spec: BundleSpec, data: DataFacts) -> str:
    copies = report.memorization
    said = [
        f"It knows {len(spec.classes)} classes and the pictures of one source: what is rare, missing or one-sided there is"
        " so in what it draws.",
        f"Copies of training pictures were found in {copies.share:.1%} of what it drew ({copies.low:.1%} to"
        f" {copies.high:.1%}); a picture that nobody found may still be one."
        if copies
        else "Whether it repeats training pictures was not measured.",
        "Who holds the rights to the training pictures may hold some to what resembles them: see the licence above.",
        "What it draws bears no mark that survives editing; the receipt in a PNG is for those who want to be believed.",
    ]
    if data.licence is None:
        said.append("The licence of its data is unknown: clear it before the pictures leave the house.")
    if spec.lesson:
        said.append("It answers at the noise levels it was taught for alone: other steps and samplers are refused.")
    said += [f"**Problem:** {problem}" for problem in report.problems]
    return "\n".join(f"- {line}" for line in said)


def _lineage(spec: BundleSpec, report: Report) -> str:
    return _rows(
        [
            ("bundle", f"`{report.bundle_digest}`"),
            ("weights (sha256)", f"`{spec.weights_sha256}`"),
            ("run", f"`{spec.run_digest}`"),
            ("recipe of training", f"`{spec.recipe_digest}`"),
            ("dataset", f"`{spec.dataset_digest}`"),
            ("report", f"`{report.digest}`"),
        ]
    )


def _rows(facts: list[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts)])


def _cell(text: str) -> str:
    """Text of others in a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")
