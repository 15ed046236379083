"""Options that several commands of the program share: one name, one meaning."""

from pathlib import Path
from typing import Annotated, get_args

import typer

from diffusion.presets import PRESETS
from diffusion.recipe import SamplerName


def _not_empty(source: str | None) -> str | None:
    if source == "":
        raise typer.BadParameter("it is empty, as an unset variable is: name the pictures, or leave the option out")
    return source


Preset = Annotated[str, typer.Option("--preset", help=f"Recipe to start from: {', '.join(PRESETS)}.")]
RecipeFile = Annotated[
    Path | None, typer.Option("--recipe", help="TOML file that changes it; see `diffusion recipe show`.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one key, such as train.images=1000. Repeatable."),
]
Name = Annotated[str | None, typer.Option("--name", help="Name of the registered model [the recipe's].")]
Source = Annotated[
    str | None,
    typer.Option(
        "--source",
        callback=_not_empty,
        help="Folder, archive, table or s3:// of pictures; see docs/sources.md. [embedded]",
    ),
]
Dataset = Annotated[
    str | None,
    typer.Option(
        "--dataset", metavar="REF", help="A published dataset, instead of --source; see `diffusion data list`."
    ),
]
Init = Annotated[
    str | None,
    typer.Option(
        "--init",
        metavar="MODEL",
        help="Registered model whose weights training starts from: NAME, NAME@ALIAS or NAME@VERSION. [random weights]",
    ),
]
Warm = Annotated[
    bool,
    typer.Option("--warm", help="Start training from the champion of the same name, where there is one yet."),
]
Home = Annotated[Path | None, typer.Option("--home", help="The only folder written to [DIFFUSION_HOME or .diffusion].")]
Workers = Annotated[
    str | None,
    typer.Option(
        "--workers", metavar="N|LEAST:MOST", help="Training workers, as 4 or 2:8 [one per GPU, or 2 on a CPU]."
    ),
]
Port = Annotated[int | None, typer.Option("--port", help="Port of the endpoint [DIFFUSION_PORT or 7777].")]
Debug = Annotated[bool, typer.Option("--debug", help="Show libraries' own output, and tracebacks.")]
Which = Annotated[str, typer.Option("--model", help="Alias or version: champion, challenger, 1, 2 ...")]

Canaries = Annotated[
    list[str] | None,
    typer.Option(
        "--canary", metavar="WHICH=SHARE", help="Alias or version that gets a share, as challenger=0.1. Repeatable."
    ),
]
Beside = Annotated[
    list[str] | None,
    typer.Option(
        "--beside", metavar="NAME[@WHICH]", help="Another model that can be asked for. Repeatable. [its champion]"
    ),
]
Follow = Annotated[
    float | None,
    typer.Option("--follow", min=1, metavar="SECONDS", help="Look so often what the aliases mean, and serve that."),
]

RegisteredName = Annotated[str, typer.Option("--name", help="Registered model.")]
BundleFolder = Annotated[Path | None, typer.Option("--bundle", help="Bundle's folder, instead of --name.")]
Picture = Annotated[Path, typer.Argument(metavar="PICTURE", help="A PNG, JPEG, WebP, GIF, BMP or TIFF file.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Picture i depends on it and i. [drawn, and printed]")]
Steps = Annotated[int | None, typer.Option("--steps", help="Noise levels visited. [the model's]")]
SamplerOption = Annotated[
    str | None, typer.Option("--sampler", help=f"{', '.join(get_args(SamplerName))}. [the model's]")
]
Out = Annotated[Path | None, typer.Option("--out", help="Folder for the PNGs. [a new one in the home]")]
