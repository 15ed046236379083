"""The commands that draw here, with a model that is finished: sample, restore, edit."""

from pathlib import Path
from typing import Annotated, get_args

import typer

from diffusion.recipe import GuidanceKind
from flows.console import say
from flows.foreground import guarded
from flows.options import (
    BundleFolder,
    Debug,
    Home,
    Out,
    Picture,
    RegisteredName,
    SamplerOption,
    Seed,
    Steps,
    Which,
)
from flows.site import Site

app = typer.Typer()


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
    size: Annotated[
        str | None,
        typer.Option("--size", metavar="WIDTHxHEIGHT", help="In pixels, of a model of several sizes. [the squarest]"),
    ] = None,
    seed: Seed = None,
    steps: Steps = None,
    sampler: SamplerOption = None,
    guidance: Annotated[float | None, typer.Option("--guidance", help="1 is none. [the model's]")] = None,
    guidance_kind: Annotated[
        str | None, typer.Option("--guidance-kind", help=f"{', '.join(get_args(GuidanceKind))}. [the model's]")
    ] = None,
    format: Annotated[str, typer.Option("--format", help="png or webp, which is smaller; both without loss.")] = "png",
    out: Out = None,
    home: Home = None,
    debug: Debug = False,
) -> None:
    """Draw pictures with a registered model, without Ray: a file each, with its receipt inside, and a grid."""

    def work(site: Site) -> None:
        from flows.sample import draw

        options = {"n": n, "size": size, "seed": seed, "steps": steps, "sampler": sampler}
        options |= {"guidance": guidance, "guidance_kind": guidance_kind}
        asked = {"labels": label or [], "prompts": prompt or [], "format": format, "options": options}
        folder = draw(site, name, model, bundle=bundle, out=out, **asked)
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

        options = {"label": label, "prompt": prompt, "n": n, "seed": seed, "steps": steps, "guidance": guidance}
        options |= {"task": task, "way": way, "factor": factor, "noise": noise, "repeats": repeats}
        _strip(flow(site, name, model, picture, bundle=bundle, mask=mask, out=out, options=options))

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
    strength: Annotated[float | None, typer.Option("--strength", help="Above 0, little, to 1, all. [0.6]")] = None,
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
        options |= {"sampler": sampler, "strength": strength, "coarse": coarse}
        options |= {"from_label": from_label, "from_prompt": from_prompt}
        _strip(flow(site, name, model, picture, bundle=bundle, mask=mask, out=out, options=options))

    guarded(work, debug, home=home)


def _strip(folder: Path) -> None:
    """Where the results are, beside what they were made of."""
    say(f"  strip      {folder}/strip.png")
