"""The commands on where things come from: replay."""

from pathlib import Path
from typing import Annotated

import typer

from flows.foreground import guarded
from flows.options import Debug, Home
from flows.site import Site

app = typer.Typer()

Drawn = Annotated[Path, typer.Argument(metavar="PICTURE", help="A PNG that was drawn here, with its receipt inside.")]


@app.command()
def replay(
    picture: Drawn,
    out: Annotated[Path | None, typer.Option("--out", help="File for what is drawn. [compared, and not kept]")] = None,
    tolerance: Annotated[
        int, typer.Option("--tolerance", help="Largest difference of a value, of 255, that is let pass.")
    ] = 0,
    home: Home = None,
    debug: Debug = False,
) -> None:
    """Draw a picture again from its receipt.  Exit code 0: the same; 1: another, by how much is said."""

    def work(site: Site) -> None:
        from flows.replay import replay as flow

        if not flow(site, picture, out=out, tolerance=tolerance):
            raise typer.Exit(1)

    guarded(work, debug, home=home)
