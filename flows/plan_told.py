"""A plan in words: a table for people, JSON for programs."""

import json

from diffusion.data.report import amount
from diffusion.planning.stages import Foretold
from flows.console import say


def as_json(plan: Foretold) -> str:
    return json.dumps(plan.model_dump(mode="json") | {"seconds": plan.seconds, "cost": plan.cost}, indent=2)


def told(plan: Foretold, *, priced: bool) -> None:
    """The plan for people."""
    heads = ["stage", "about", "from", "to", "waits for", "writes", "a worker", "GET", "PUT"] + ["cost"] * priced
    rows = [heads]
    for stage in plan.stages:
        asked = stage.requests
        rows.append(
            [
                stage.name,
                *(duration(value) for value in (stage.seconds, stage.low, stage.high)),
                stage.waits_for,
                *(amount(round(value)) if value else "-" for value in (stage.written, stage.memory)),
                *(f"{value:,.0f}" if value else "-" for value in (asked.get + asked.head, asked.put + asked.list)),
                *([f"{stage.cost:,.2f}"] * priced),
            ]
        )
    ends = (plan.seconds, sum(stage.low for stage in plan.stages), sum(stage.high for stage in plan.stages))
    written = amount(round(sum(stage.written for stage in plan.stages)))
    rows.append(["all", *map(duration, ends), "", written, "", "", "", *([f"{plan.cost:,.2f}"] * priced)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(heads))]
    for row in rows:
        say("  " + "  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip())
    found = plan.bottleneck
    where = "the whole line" if found.stage == "all" else found.stage
    say(f"  waits for  {found.waits_for} ({where}, {found.share:.0%} of the time). To move it: {found.moved_by}")
    if (cost := plan.failures) is not None:
        say(
            f"  failures   one in {duration(cost.mtbf_s)}: with a checkpoint every {duration(cost.own_s)}, as it is,"
            f" {cost.own_lost:.2%} of the time goes; least with one every {duration(cost.best_s)}: {cost.best_lost:.2%}"
        )
    for words in plan.notes:
        say(f"  by         {words}")


def duration(value: float) -> str:
    """Seconds for people, however many: "8.1 s", "5:07", "7.5 h", "12 days"."""
    if value < 60:
        return f"{value:.1f} s"
    if value < 2 * 3_600:
        return f"{int(value) // 60}:{int(value) % 60:02d}"
    return f"{value / 3_600:.1f} h" if value < 48 * 3_600 else f"{value / 86_400:,.1f} days"
