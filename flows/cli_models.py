"""The commands on registered models: models and rollback."""

from typing import TYPE_CHECKING, Annotated

import typer

from flows.console import say, ticked
from flows.foreground import guarded, looking
from flows.options import Debug, Home
from flows.site import Site

if TYPE_CHECKING:
    from diffusion.adapters.mlflow_listing import Listed

app = typer.Typer()

_COLUMNS = {"frechet": "Frechet", "coverage": "coverage", "recall": "recall", "memorized": "copies"}


@app.command("models")
def models_(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Of one model, with the gate's reasons.")] = None,
    home: Home = None,
    debug: Debug = False,
) -> None:
    """The registered models: versions, aliases, how the gate judged each, and its numbers."""

    def work(site: Site) -> None:
        from diffusion.adapters.mlflow_listing import models, moves_of, versions_of

        tracking = site.tracking(name or "models")
        names = [name] if name else models(tracking)
        if not names:
            say(f"  no model is registered in {site.mlflow_uri}; `diffusion run` makes and registers one")
        for each in names:
            _table(each, versions := versions_of(tracking, each))
            if name is None:
                continue
            for listed in versions:
                say(f"  version {listed.version}, bundle {listed.bundle_digest[:16]}: {listed.verdict}")
                say(f"    by {listed.measure}")
                for key, head in _COLUMNS.items():
                    if key in listed.metrics:
                        say(f"    {head} {_with_interval(listed.metrics, key)}")
                for reason in listed.reasons:
                    say(f"    {reason}")
            for move in moves_of(tracking, each):
                source = "nobody" if move.source is None else f"version {move.source}"
                say(f"  {move.at}  champion from {source} to version {move.target}, by {move.by}")

    looking(work, debug, home=home)


@app.command()
def rollback(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Registered model.")],
    to: Annotated[
        str | None, typer.Option("--to", metavar="VERSION", help="A version that was champion. [the one before]")
    ] = None,
    home: Home = None,
    debug: Debug = False,
) -> None:
    """Give the alias champion back to the version before.  The one it is taken from is not promoted again by the gate."""

    def work(site: Site) -> None:
        from diffusion.adapters.mlflow_listing import back

        move = back(site.tracking(name), name, to)
        ticked(f"{name}: the champion is version {move.target}, and not version {move.source} any more")
        say(
            "  An endpoint goes on with what it loaded, unless it was deployed with --follow;"
            f" `diffusion deploy --name {name}` serves version {move.target}."
        )

    guarded(work, debug, room=0, home=home)


def _table(name: str, versions: "list[Listed]") -> None:
    say(title=name)
    heads = "".join(f"{head:>10}" for head in _COLUMNS.values())
    say(f"  {'version':<8} {'aliases':<22} {'gate':<10}{heads}  made")
    if len({listed.measure for listed in versions if listed.measure}) > 1:
        say("  (measured in different ways, and so not to be compared: see each)")
    for listed in versions:
        numbers = "".join(f"{_shown(listed.metrics.get(key)):>10}" for key in _COLUMNS)
        aliases = ", ".join(listed.aliases)
        say(f"  {listed.version:<8} {aliases:<22} {listed.verdict:<10}{numbers}  {listed.made}")


def _with_interval(metrics: dict[str, float], key: str) -> str:
    low, high = metrics.get(f"{key}_low"), metrics.get(f"{key}_high")
    return _shown(metrics[key]) + ("" if low is None or high is None else f" ({_shown(low)} to {_shown(high)})")


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
