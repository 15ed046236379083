"""The program `diffusion`.

Prefect, Ray and MLflow read their folders from the environment when they are imported, so each command first prepares the
site and then imports its flow.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, get_args

import typer

from diffusion.recipe import PRESETS, GuidanceKind, Recipe, SamplerName
from flows import recipes
from flows.console import say, waiting
from flows.foreground import end_soon, guarded, prefect_ready, reported, stay
from flows.preflight import check, check_devices, check_serving
from flows.site import Site

app = typer.Typer(
    help="From a folder of pictures to a diffusion model behind an HTTP endpoint.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
recipe_app = typer.Typer(help="What a recipe says.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(recipe_app, name="recipe")

Preset = Annotated[str, typer.Option("--preset", help=f"Recipe to start from: {', '.join(PRESETS)}.")]
RecipeFile = Annotated[
    Path | None, typer.Option("--recipe", help="TOML file that changes it; see `diffusion recipe show`.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one key, such as train.images=1000. Repeatable."),
]
Name = Annotated[str | None, typer.Option("--name", help="Name of the registered model [the recipe's].")]
Source = Annotated[str, typer.Option("--source", help="Folder or .zip of pictures, or the word embedded.")]
Home = Annotated[Path | None, typer.Option("--home", help="The only folder written to [DIFFUSION_HOME or .diffusion].")]
Workers = Annotated[int | None, typer.Option("--workers", min=1, help="Training workers [one per GPU, or 2 on a CPU].")]
Port = Annotated[int | None, typer.Option("--port", help="Port of the endpoint [DIFFUSION_PORT or 7777].")]
Debug = Annotated[bool, typer.Option("--debug", help="Show libraries' own output, and tracebacks.")]
Which = Annotated[str, typer.Option("--model", help="Alias or version: champion, challenger, 1, 2 ...")]

RegisteredName = Annotated[str, typer.Option("--name", help="Registered model.")]
BundleFolder = Annotated[Path | None, typer.Option("--bundle", help="Bundle's folder, instead of --name.")]
Picture = Annotated[Path, typer.Argument(metavar="PICTURE", help="A PNG, JPEG, WebP, GIF, BMP or TIFF file.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Picture i depends on it and i. [drawn, and printed]")]
Steps = Annotated[int | None, typer.Option("--steps", help="Noise levels visited. [the model's]")]
SamplerOption = Annotated[
    str | None, typer.Option("--sampler", help=f"{', '.join(get_args(SamplerName))}. [the model's]")
]
Out = Annotated[Path | None, typer.Option("--out", help="Folder for the PNGs. [a new one in the home]")]


@app.command()
def shard(
    preset: Preset = "demo",
    source: Source = "embedded",
    settings: Settings = None,
    recipe_file: RecipeFile = None,
    home: Home = None,
    debug: Debug = False,
) -> None:
    """Cut pictures into shards: decode, resize, split into training and held-out, write."""

    def work(recipe: Recipe, site: Site) -> None:
        from diffusion.data.sources import open_source

        open_source(source)
        with prefect_ready():
            from flows.shard import facts
            from flows.shard import shard as flow
        for key, value in facts(flow(recipe.shard, source, site, recipe.train)).items():
            say(f"  {key:<10} {value}")

    _do(work, debug, preset, recipe_file, settings, None, home=home)


@app.command()
def train(
    preset: Preset = "demo",
    source: Source = "embedded",
    settings: Settings = None,
    recipe_file: RecipeFile = None,
    name: Name = None,
    home: Home = None,
    workers: Workers = None,
    debug: Debug = False,
) -> None:
    """Train on the shards of the source.  Interrupted, it goes on from its last checkpoint when called again."""

    def work(recipe: Recipe, site: Site) -> None:
        check_devices(site, batch_size=recipe.train.batch_size)
        with prefect_ready():
            from flows import shard as shards
            from flows.train import train as flow
        run = flow(recipe.train, shards.finished(recipe.shard, source, site), recipe.name, site)
        say(f"  checkpoint {run.uri}\n  digest     {run.digest}")

    _do(work, debug, preset, recipe_file, settings, name, home=home, workers=workers)


@app.command()
def evaluate(
    preset: Preset = "demo",
    source: Source = "embedded",
    settings: Settings = None,
    recipe_file: RecipeFile = None,
    name: Name = None,
    home: Home = None,
    debug: Debug = False,
) -> None:
    """Measure the trained run: Frechet distance, held-out loss, variational bound, a grid of samples."""

    def work(recipe: Recipe, site: Site) -> None:
        with prefect_ready():
            from flows import shard as shards
            from flows import train as runs
            from flows.evaluate import evaluate as flow
        run = runs.finished(recipe.train, shards.finished(recipe.shard, source, site), site)
        evaluation = flow(recipe.evaluate, run, recipe.name, site)
        from flows.summary import measured

        measured(evaluation)

    _do(work, debug, preset, recipe_file, settings, name, home=home)


@app.command()
def register(
    preset: Preset = "demo",
    source: Source = "embedded",
    settings: Settings = None,
    recipe_file: RecipeFile = None,
    name: Name = None,
    home: Home = None,
    debug: Debug = False,
) -> None:
    """Make the evaluated model a version in MLflow's registry, and champion if it passes the gate."""

    def work(recipe: Recipe, site: Site) -> None:
        with prefect_ready():
            from flows import evaluate as evaluations
            from flows import shard as shards
            from flows import train as runs
            from flows.register import register as flow
        run = runs.finished(recipe.train, shards.finished(recipe.shard, source, site), site)
        evaluation = evaluations.finished(recipe.evaluate, run, site)
        from flows.summary import registered

        registered(flow(recipe, evaluation, site))

    _do(work, debug, preset, recipe_file, settings, name, home=home)


@app.command()
def deploy(
    preset: Preset = "demo",
    settings: Settings = None,
    recipe_file: RecipeFile = None,
    name: Name = None,
    model: Which = "champion",
    home: Home = None,
    port: Port = None,
    debug: Debug = False,
) -> None:
    """Serve a registered model over HTTP until Ctrl-C."""

    def work(recipe: Recipe, site: Site) -> None:
        check_serving(site)
        with prefect_ready():
            from flows.deploy import deploy as flow
        endpoint = flow(recipe.serve, recipe.name, model, site)
        from flows.summary import answering

        answering(endpoint)
        stay()

    _do(work, debug, preset, recipe_file, settings, name, home=home, port=port)


@app.command()
def run(
    preset: Preset = "demo",
    source: Source = "embedded",
    settings: Settings = None,
    recipe_file: RecipeFile = None,
    name: Name = None,
    home: Home = None,
    workers: Workers = None,
    port: Port = None,
    until: Annotated[str, typer.Option("--until", help="Last stage: register, or deploy.")] = "deploy",
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Keep the endpoint up until Ctrl-C.")] = True,
    debug: Debug = False,
) -> None:
    """The whole line: shard, train, evaluate, register, deploy.  Finished work is not done twice."""

    def work(recipe: Recipe, site: Site) -> None:
        with waiting("reading the source and checking the machine"):
            check(recipe, source, until, site)
        with prefect_ready():
            from flows.pipeline import pipeline
        line = pipeline(recipe, source, until, site)
        from flows.summary import summary

        stays = wait or site.ray is not None
        summary(line, site, answers=stays)
        if line.endpoint is not None and wait:
            stay()

    _do(work, debug, preset, recipe_file, settings, name, home=home, workers=workers, port=port)


@app.command()
def sample(
    name: RegisteredName = "demo",
    model: Which = "champion",
    bundle: BundleFolder = None,
    label: Annotated[list[str] | None, typer.Option("--label", help="Class to draw. Repeatable. [every class]")] = None,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", help="What to draw, in words, if the model reads them. Repeatable.")
    ] = None,
    n: Annotated[int, typer.Option("--n", max=10_000, help="Pictures per class and prompt.")] = 8,
    seed: Seed = None,
    steps: Steps = None,
    sampler: SamplerOption = None,
    guidance: Annotated[float | None, typer.Option("--guidance", help="1 is none. [the model's]")] = None,
    guidance_kind: Annotated[
        str | None, typer.Option("--guidance-kind", help=f"{', '.join(get_args(GuidanceKind))}. [the model's]")
    ] = None,
    out: Out = None,
    home: Home = None,
    debug: Debug = False,
) -> None:
    """Draw pictures with a registered model, without Ray: a PNG each, with its receipt inside, and a grid."""

    def work(site: Site) -> None:
        from flows.sample import draw

        options = {"n": n, "seed": seed, "steps": steps, "sampler": sampler}
        options |= {"guidance": guidance, "guidance_kind": guidance_kind}
        folder = draw(
            site, name, model, bundle=bundle, labels=label or [], prompts=prompt or [], out=out, options=options
        )
        say(f"  grid       {folder}/grid.png")

    guarded(work, debug, home=home)


@app.command()
def restore(
    picture: Picture,
    task: Annotated[str, typer.Option("--task", help="super-resolution, inpainting or colorization.")],
    way: Annotated[
        str | None,
        typer.Option("--way", help="trained or zero-shot. [trained, where the model was trained for the task]"),
    ] = None,
    factor: Annotated[
        int | None, typer.Option("--factor", help="super-resolution: 2, 4 or 8. colorization: of a small picture.")
    ] = None,
    mask: Annotated[
        Path | None,
        typer.Option("--mask", help="inpainting: picture of the same size, white where something is missing."),
    ] = None,
    noise: Annotated[
        float, typer.Option("--noise", help="zero-shot: the picture's own noise; white - black is 2.")
    ] = 0.0,
    repeats: Annotated[
        int | None, typer.Option("--repeats", help="zero-shot: how often each part of the way is gone. [3]")
    ] = None,
    name: RegisteredName = "demo",
    model: Which = "champion",
    bundle: BundleFolder = None,
    label: Annotated[str | None, typer.Option("--label", help="The picture's class. [none]")] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", help="What it shows, in words, if the model reads them. [none]")
    ] = None,
    n: Annotated[int, typer.Option("--n", max=64, help="Results, each another guess.")] = 1,
    seed: Seed = None,
    steps: Steps = None,
    guidance: Annotated[
        float | None, typer.Option("--guidance", help="Towards --label and --prompt. [1, none]")
    ] = None,
    out: Out = None,
    home: Home = None,
    debug: Debug = False,
) -> None:
    """Enlarge a picture, fill in what is missing, or colour it: with a model trained for that (--name restorer), or with
    any that draws."""

    def work(site: Site) -> None:
        from flows.restore import restore as flow

        said = label is not None or prompt is not None
        strength = 1.0 if guidance is None and said else guidance  # not the model's own, which is for drawing freely
        options = {"label": label, "prompt": prompt, "n": n, "seed": seed, "steps": steps, "guidance": strength}
        folder = flow(
            site,
            name,
            model,
            picture,
            task=task,
            bundle=bundle,
            way=way,
            factor=factor,
            mask=mask,
            noise=noise,
            repeats=repeats,
            out=out,
            options=options,
        )
        say(f"  strip      {folder}/strip.png")

    guarded(work, debug, home=home)


@app.command()
def edit(
    picture: Picture,
    label: Annotated[str | None, typer.Option("--label", help="Class to change it towards. [none]")] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", help="What it is to show, in words, if the model reads them. [none]")
    ] = None,
    from_label: Annotated[
        str | None,
        typer.Option("--from-label", help="Its own class: change that and keep the rest. [noise it instead]"),
    ] = None,
    from_prompt: Annotated[
        str | None,
        typer.Option("--from-prompt", help="What it shows now: change that and keep the rest. [noise it instead]"),
    ] = None,
    strength: Annotated[float, typer.Option("--strength", help="Above 0, little, to 1, all.")] = 0.6,
    mask: Annotated[
        Path | None, typer.Option("--mask", help="Picture of the same size, white where it may change. [everywhere]")
    ] = None,
    coarse: Annotated[
        int | None, typer.Option("--coarse", help="Keep the coarse look: means of blocks of so many pixels. [free]")
    ] = None,
    name: RegisteredName = "demo",
    model: Which = "champion",
    bundle: BundleFolder = None,
    n: Annotated[int, typer.Option("--n", max=64, help="Results, each from other noise; 1 with --from-...")] = 1,
    seed: Seed = None,
    steps: Steps = None,
    sampler: SamplerOption = None,
    guidance: Annotated[
        float | None, typer.Option("--guidance", help="Towards --label and --prompt; 1 is none. [the model's]")
    ] = None,
    out: Out = None,
    home: Home = None,
    debug: Debug = False,
) -> None:
    """Change a picture towards a class or words: from what it is to what you ask, or by noise, more with more strength."""

    def work(site: Site) -> None:
        from flows.edit import edit as flow

        options = {"label": label, "prompt": prompt, "n": n, "seed": seed, "steps": steps, "guidance": guidance}
        folder = flow(
            site,
            name,
            model,
            picture,
            strength=strength,
            from_label=from_label,
            from_prompt=from_prompt,
            bundle=bundle,
            mask=mask,
            coarse=coarse,
            out=out,
            options=options | {"sampler": sampler},
        )
        say(f"  strip      {folder}/strip.png")

    guarded(work, debug, home=home)


@recipe_app.command("show")
def recipe_show(
    preset: Preset = "demo",
    settings: Settings = None,
    recipe_file: RecipeFile = None,
    name: Name = None,
    describe: Annotated[bool, typer.Option("--describe", help="Say what each key means and may be.")] = False,
) -> None:
    """Print the merged recipe as TOML, and its digest.  `--recipe FILE` reads such a file back."""
    with reported(debug=False):
        merged = recipes.merged(preset, file=recipe_file, settings=settings or (), name=name)
        typer.echo(recipes.as_toml(merged, describe=describe), nl=False)


@recipe_app.command("list")
def recipe_list() -> None:
    """The presets, with hardware, time and result of each."""
    typer.echo(recipes.presets())


def main() -> None:
    """Entry point of the program."""
    try:
        app()
    except SystemExit as done:
        end_soon(done.code)
        raise


def _do(
    work: Callable[[Recipe, Site], None],
    debug: bool,
    preset: str,
    recipe_file: Path | None,
    settings: list[str] | None,
    name: str | None,
    **site: object,
) -> None:
    """Run a command on its recipe and site."""
    with reported(debug=debug):
        recipe = recipes.merged(preset, file=recipe_file, settings=settings or (), name=name)
    guarded(lambda where: work(recipe, where), debug, **site)
