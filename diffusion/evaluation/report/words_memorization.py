"""The report's words on memorization."""

from typing import TYPE_CHECKING

from diffusion.evaluation.metrics.memorization import rank_of

if TYPE_CHECKING:
    from diffusion.evaluation.facts.memorized import Memorization
    from diffusion.evaluation.report.report import Report


def memorization_words(report: "Report") -> list[str]:
    """A section of the report, in paragraphs."""
    found = report.memorization
    if found is None:
        why = "the model gave no pictures" if report.problems else "the dataset has no held-out pictures"
        return ["## Memorization", f"Not measured: {why}."]
    facts, sample = found.identity, found.identity.sample
    held_out, mean_of = facts.held_out_pictures, min(facts.neighbours, sample.reference_pictures)
    rows = [
        "| | share of copies | |",
        "|---|---|---|",
        f"| **this model** | **{found.share:.2%}** | {found.confidence:.0%} interval {found.low:.2%} to {found.high:.2%};"
        f" {found.near:,} of {sample.samples:,} drawn pictures are near a training picture, {found.expected:.3g} expected"
        f" of a model that repeats none{_counted(found)} |",
    ]
    notes = (
        f"A picture is as near as its nearest training picture is beside the mean of the {mean_of:,} nearest, in features of"
        f" {sample.extractor.name} or in the pixels of copies of {facts.pixels} x {facts.pixels}, mirrored ones too. Near"
        f" are those nearer than the held-out picture of rank {rank_of(held_out)} of {held_out:,}, the nearest first:"
        f" held-out pictures nobody can have repeated. Copies are what there are more of near pictures than held-out ones"
        f" would give. The interval counts both as samples: of models that repeat nothing"
        f" {(1 - found.confidence) / 2:.1%} at most have one above 0; its upper end takes all near pictures for copies."
        f" Searched were {sample.reference_pictures:,} training pictures. Few copies, and pictures cut out, moved or put"
        f" together of several, may stay unseen."
    )
    parts = ["## Memorization", "\n".join(rows), notes]
    if found.threshold == 0:
        parts.append(
            "**Copies in the data:** held-out pictures are themselves in the training split, so that nothing is nearer than"
            " they are and copies cannot be told: shard with `shard.near_duplicates`."
        )
    if found.pairs:
        parts += [
            "![drawn pictures beside their nearest training pictures](nearest.png)",
            "The nearest pairs, by their distance in medians of the held-out pictures'.",
            "\n".join(
                [
                    "| drawn: label, seed | training picture | distance | near |",
                    "|---|---|---|---|",
                    *(
                        f"| {pair.label}, {pair.seed} | {pair.key} | {pair.score:.3g} | {'yes' if pair.near else ''} |"
                        for pair in found.pairs
                    ),
                ]
            ),
        ]
    return parts


def _counted(found: "Memorization") -> str:
    if found.counted == found.near:
        return ""
    return f"; {found.counted:,} count, since the others are near to the same few training pictures"
