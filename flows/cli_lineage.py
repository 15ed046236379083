"""The commands on where things come from, and whether they are as they were written: trace, replay, verify."""

from pathlib import Path
from typing import Annotated

import typer

from flows.foreground import looking, reading
from flows.options import Debug, Home
from flows.site import Site

app = typer.Typer()

Drawn = Annotated[
    Path, typer.Argument(metavar="PICTURE", help="A PNG or WebP that was drawn here, with its receipt inside.")
]


@app.command()
def trace(
    picture: Drawn,
    every: Annotated[bool, typer.Option("--all", help="Print every shard, and the keys of its pictures.")] = False,
    nearest: Annotated[
        int, typer.Option("--nearest", max=100, help="So many training pictures most like it; 0 for none.")
    ] = 3,
    side: Annotated[
        Path | None, typer.Option("--picture", metavar="FILE", help="PNG to make of those beside it. [none]")
    ] = None,
    home: Home = None,
    debug: Debug = False,
) -> None:
    """Say where a picture comes from: its model, its run, its data, its shards.  Exit code 1: a link is missing."""

    def work(site: Site) -> None:
        from flows.trace import trace as flow

        if not flow(site, picture, every=every, nearest=nearest, side=side):
            raise typer.Exit(1)

    reading(work, debug, home=home)


@app.command()
def replay(
    picture: Drawn,
    out: Annotated[Path | None, typer.Option("--out", help="File for what is drawn. [compared, and not kept]")] = None,
    tolerance: Annotated[
        int, typer.Option("--tolerance", help="Largest difference of a value, of 255, that is let pass.")
    ] = 0,
    given: Annotated[
        Path | None, typer.Option("--given", help="Of a picture of `restore` or `edit`: the file it was made of.")
    ] = None,
    mask: Annotated[Path | None, typer.Option("--mask", help="And the mask, where it was made with one.")] = None,
    home: Home = None,
    debug: Debug = False,
) -> None:
    """Draw a picture again from its receipt.  Exit code 0: the same; 1: another, by how much is said."""

    def work(site: Site) -> None:
        from flows.replay import replay as flow

        if not flow(site, picture, out=out, tolerance=tolerance, given=given, mask=mask):
            raise typer.Exit(1)

    reading(work, debug, home=home)


@app.command()
def verify(home: Home = None, debug: Debug = False) -> None:
    """Compare every digest of the store with the bytes it stands for, and change nothing.  Exit code 1: something that was
    published is damaged or missing."""

    def work(site: Site) -> None:
        from flows.verify import verify as flow

        if not flow(site):
            raise typer.Exit(1)

    looking(work, debug, home=home)
