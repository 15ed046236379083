"""`diffusion schedule`: the line by itself, every night."""

from contextlib import ExitStack
from typing import Annotated

import typer

from diffusion.recipe import Recipe
from flows.command import EMBEDDED, do, named_dataset
from flows.console import say, waiting
from flows.foreground import stay
from flows.options import Dataset, Debug, Home, Init, Name, Port, Preset, RecipeFile, Settings, Source, Warm, Workers
from flows.preflight import check
from flows.site import Site

app = typer.Typer()
_LOOK_S = 5.0


@app.command()
def schedule(
    cron: Annotated[
        str, typer.Option("--cron", metavar="LINE", help="When, as '0 3 * * *': every night at three.")
    ] = "0 3 * * *",
    timezone: Annotated[str, typer.Option("--timezone", metavar="ZONE", help="Whose three o'clock.")] = "UTC",
    preset: Preset = "demo",
    source: Source = None,
    dataset: Dataset = None,
    settings: Settings = None,
    recipe_file: RecipeFile = None,
    name: Name = None,
    init: Init = None,
    warm: Warm = False,
    until: Annotated[
        str | None,
        typer.Option("--until", help="Last stage: register, or deploy. [deploy on the cluster of DIFFUSION_RAY]"),
    ] = None,
    now: Annotated[bool, typer.Option("--now", help="Run once at the start, too.")] = False,
    home: Home = None,
    workers: Workers = None,
    port: Port = None,
    debug: Debug = False,
) -> None:
    """Run the line by itself, as `run` does, until Ctrl-C.  Where nothing has changed, it does nothing, and says why."""

    def work(recipe: Recipe, site: Site) -> None:
        from flows import prefect_server

        last = until or ("register" if site.ray is None else "deploy")
        if last == "deploy" and site.ray is None:
            raise ValueError(
                "--until deploy: an endpoint needs a Ray that outlives each run: name a cluster's with DIFFUSION_RAY, or let"
                " `diffusion deploy --follow 60` serve, beside this, what becomes champion"
            )
        with waiting("reading the source and checking the machine"):
            given = named_dataset(dataset, source, site)
            check(recipe, source or EMBEDDED, last, site, given, init)
        url, ours = prefect_server.address_for(site)
        from flows import scheduled

        when = scheduled.schedule_of(cron, timezone)
        with ExitStack() as stack:
            if ours:
                stack.enter_context(scheduled.alone(site))
                stack.enter_context(prefect_server.server(url, site))
            elif not prefect_server.answers(url):
                raise ValueError(
                    f"no Prefect server answers at {url}: start it, or unset PREFECT_API_URL to do without one"
                )
            scheduled.handed_on(site)
            deployment = scheduled.deployment_of(recipe, source or EMBEDDED, last, given, init, warm, when)
            watching = stack.enter_context(scheduled.serving(deployment, site, pause=not ours))
            say(f"  schedule   {recipe.name} at {cron} {timezone}, to {last}; one run at a time")
            say(f"  Prefect    {prefect_server.page(url)}")
            if now:
                scheduled.run_now(watching.serving.id)
            stay(watching.look, _LOOK_S)
            say("  ending what runs, if anything does")

    do(work, debug, preset, recipe_file, settings, name, home=home, workers=workers, port=port)
