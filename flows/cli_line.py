"""The commands of the line, one per stage and one for all of them.

Prefect, Ray and MLflow read their folders from the environment when they are imported, so each command first prepares the
site and then imports its flow.
"""

from typing import Annotated

import typer

from diffusion.recipe import Recipe, student_of
from flows import cli_data, origin
from flows.command import EMBEDDED, do, made_dataset, named_dataset, trained_run
from flows.console import waiting
from flows.foreground import looking, prefect_configured, prefect_ready, stay
from flows.options import (
    Beside,
    Canaries,
    Dataset,
    Debug,
    Follow,
    Home,
    Init,
    Name,
    Port,
    Preset,
    RecipeFile,
    Settings,
    Source,
    Warm,
    Which,
    Workers,
)
from flows.preflight import check, check_encoders, check_measuring, check_serving, check_sweep, check_training
from flows.site import Site

app = typer.Typer()


@app.command()
def shard(
    preset: Preset = "demo",
    source: Source = None,
    settings: Settings = None,
    recipe_file: RecipeFile = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Read every file, and go on from no version of before.")
    ] = False,
    dry: Annotated[bool, typer.Option("--dry-run", help="Say what would happen, and write nothing.")] = False,
    home: Home = None,
    debug: Debug = False,
) -> None:
    """Cut pictures into shards.  Decode, resize, split into training and held-out, write; what has changed since the last
    time makes a new version."""

    def work(recipe: Recipe, site: Site) -> None:
        from diffusion.data.sources import open_source

        where = source or EMBEDDED
        with waiting("reading the source"):
            check_encoders(recipe.train)
            open_source(where, columns=recipe.shard.columns)
        with prefect_ready():
            from flows.shard import shard as flow
        made = flow(recipe.shard, where, site, recipe.train, fresh)
        from diffusion.data.datasets import opened

        cli_data.sharded(opened(made.uri))

    def look(recipe: Recipe, site: Site) -> None:
        from flows.dry_run import dry_shard

        check_encoders(recipe.train)
        dry_shard(recipe.shard, source or EMBEDDED, site, fresh)

    if dry:
        do(look, debug, preset, recipe_file, settings, None, run=looking, home=home)
    else:
        do(work, debug, preset, recipe_file, settings, None, home=home)


@app.command()
def train(
    preset: Preset = "demo",
    source: Source = None,
    dataset: Dataset = None,
    settings: Settings = None,
    recipe_file: RecipeFile = None,
    name: Name = None,
    init: Init = None,
    home: Home = None,
    workers: Workers = None,
    dry: Annotated[
        bool,
        typer.Option("--dry-run", help="Say what it would take on so many workers, there or not, and start nothing."),
    ] = False,
    debug: Debug = False,
) -> None:
    """Train on the shards of the source.  Interrupted, it goes on from its last checkpoint when called again."""

    def work(recipe: Recipe, site: Site) -> None:
        check_training(site, recipe.train)
        made = made_dataset(recipe, dataset, source, site)
        origin.check_news(recipe.train, init, made, site)
        with prefect_ready():
            from flows.train import train as flow
        run = flow(recipe.train, made, recipe.name, site, recipe.evaluate, init, recipe.sweep.ema)
        from flows.summary import trained

        trained(run)

    def look(recipe: Recipe, site: Site) -> None:
        from flows.dry_run import dry_train
        from flows.finished import newest_dataset

        made = named_dataset(dataset, source, site) or newest_dataset(recipe.shard, source or EMBEDDED, site)
        dry_train(recipe, made, site, init)

    if dry:
        do(look, debug, preset, recipe_file, settings, name, run=looking, home=home, workers=workers)
    else:
        do(work, debug, preset, recipe_file, settings, name, home=home, workers=workers)


@app.command()
def sweep(
    preset: Preset = "demo",
    source: Source = None,
    dataset: Dataset = None,
    settings: Settings = None,
    recipe_file: RecipeFile = None,
    name: Name = None,
    init: Init = None,
    home: Home = None,
    debug: Debug = False,
) -> None:
    """Try ways of drawing with the trained run (sweep.steps, .guidance, .sampler, .ema), choose the fastest of the best."""

    def work(recipe: Recipe, site: Site) -> None:
        check_sweep(recipe)
        run = trained_run(recipe, dataset, source, init, site)
        with prefect_ready():
            from flows.sweep import sweep as flow
        found = flow(recipe.sweep, recipe.evaluate, run, recipe.name, site)
        from flows.summary import tried

        tried(found, alone=True)

    do(work, debug, preset, recipe_file, settings, name, home=home)


@app.command()
def evaluate(
    preset: Preset = "demo",
    source: Source = None,
    dataset: Dataset = None,
    settings: Settings = None,
    recipe_file: RecipeFile = None,
    name: Name = None,
    init: Init = None,
    home: Home = None,
    debug: Debug = False,
) -> None:
    """Measure the trained run: Frechet distance, held-out loss, variational bound, a grid of samples."""

    def work(recipe: Recipe, site: Site) -> None:
        from flows.finished import swept

        check_measuring(recipe.evaluate)
        run = trained_run(recipe, dataset, source, init, site)
        recipe = swept(recipe, run, site)
        with prefect_ready():
            from flows.evaluate import evaluate as flow
        evaluation = flow(recipe.evaluate, run, recipe.name, site)
        from flows.summary import measured

        measured(evaluation)

    do(work, debug, preset, recipe_file, settings, name, home=home)


@app.command()
def register(
    preset: Preset = "demo",
    source: Source = None,
    dataset: Dataset = None,
    settings: Settings = None,
    recipe_file: RecipeFile = None,
    name: Name = None,
    init: Init = None,
    home: Home = None,
    debug: Debug = False,
) -> None:
    """Make the evaluated model a version in MLflow's registry, and champion if it passes the gate."""

    def work(recipe: Recipe, site: Site) -> None:
        from flows.finished import evaluation_of, swept

        run = trained_run(recipe, dataset, source, init, site)
        recipe = swept(recipe, run, site)
        evaluation = evaluation_of(recipe.evaluate, run, site)
        with prefect_ready():
            from flows.register import judged
            from flows.register import register as flow
        from flows.summary import registered

        model = flow(recipe, evaluation, site)
        registered(model, judged(model, site))

    do(work, debug, preset, recipe_file, settings, name, home=home)


@app.command()
def distill(
    preset: Preset = "few-steps",
    source: Source = None,
    dataset: Dataset = None,
    settings: Settings = None,
    recipe_file: RecipeFile = None,
    name: Name = None,
    init: Init = None,
    home: Home = None,
    workers: Workers = None,
    debug: Debug = False,
) -> None:
    """Teach a student to draw in few steps what the evaluated model draws in many; measure it, and register it."""

    def work(recipe: Recipe, site: Site) -> None:
        from flows.finished import evaluation_of, swept

        check_training(site, recipe.train)
        check_measuring(recipe.evaluate)
        student_of(recipe, "0" * 64)  # before anything is started
        run = trained_run(recipe, dataset, source, init, site)
        recipe = swept(recipe, run, site)
        teacher = evaluation_of(recipe.evaluate, run, site)
        with prefect_ready():
            from flows.distill import distill as flow
            from flows.register import judged
        taught = flow(recipe, teacher, site)
        from flows.summary import measured, registered

        measured(taught.evaluation)
        registered(taught.model, judged(taught.model, site))

    do(work, debug, preset, recipe_file, settings, name, home=home, workers=workers)


@app.command()
def deploy(
    preset: Preset = "demo",
    settings: Settings = None,
    recipe_file: RecipeFile = None,
    name: Name = None,
    model: Which = "champion",
    home: Home = None,
    port: Port = None,
    canary: Canaries = None,
    beside: Beside = None,
    follow: Follow = None,
    debug: Debug = False,
) -> None:
    """Serve a registered model over HTTP until Ctrl-C."""

    def work(recipe: Recipe, site: Site) -> None:
        check_serving(site)
        from flows.offer import Offer, shares_of

        offer = Offer(name=recipe.name, which=model, shares=shares_of(canary or []), beside=tuple(beside or ()))
        if prefect_configured(site):
            with prefect_ready():
                from flows.deploy import deploy as flow
            endpoint = flow(recipe.serve, offer.name, offer.which, site, offer.shares, offer.beside)
        else:  # nobody would be told, and a server of Prefect's takes as long as all the rest
            from flows.endpoint import served

            endpoint = served(recipe.serve, offer, site)
        from flows.endpoint import taken_down
        from flows.follow import Follower
        from flows.summary import answering

        answering(endpoint)
        stay(*(() if follow is None else (Follower(recipe.serve, offer, site, endpoint).look, follow)))
        taken_down(site)

    do(work, debug, preset, recipe_file, settings, name, home=home, port=port)


@app.command()
def run(
    preset: Preset = "demo",
    source: Source = None,
    dataset: Dataset = None,
    settings: Settings = None,
    recipe_file: RecipeFile = None,
    name: Name = None,
    init: Init = None,
    warm: Warm = False,
    home: Home = None,
    workers: Workers = None,
    port: Port = None,
    until: Annotated[str, typer.Option("--until", help="Last stage: register, or deploy.")] = "deploy",
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Keep the endpoint up until Ctrl-C.")] = True,
    debug: Debug = False,
) -> None:
    """The whole line: shard, train, (sweep,) evaluate, register, deploy.  Finished work is not done twice."""

    def work(recipe: Recipe, site: Site) -> None:
        with waiting("reading the source and checking the machine"):
            given = named_dataset(dataset, source, site)
            check(recipe, source or EMBEDDED, until, site, given, init)
        with prefect_ready():
            from flows.endpoint import taken_down
            from flows.pipeline import pipeline
        line = pipeline(recipe, source or EMBEDDED, until, site, given, init, warm)
        from flows.summary import summary

        stays = wait or site.ray is not None
        summary(line, site, answers=stays)
        if line.endpoint is not None and wait:
            stay()
            taken_down(site)

    do(work, debug, preset, recipe_file, settings, name, home=home, workers=workers, port=port)
