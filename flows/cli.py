"""The program `diffusion`: its commands, and what a recipe says.

Those of the line are in `cli_line`, what it would take in `cli_plan`, its schedule in `cli_schedule`, those that draw in
`cli_pictures`, on origins in `cli_lineage`, on versions in `cli_models`, on keys in `cli_keys`, load in `cli_load`, the
site and its doctor in `cli_site`, those on datasets in `cli_data` and `cli_quarantine`.
"""

from typing import Annotated

import typer

from flows import (
    cli_data,
    cli_keys,
    cli_line,
    cli_lineage,
    cli_load,
    cli_models,
    cli_pictures,
    cli_plan,
    cli_quarantine,
    cli_schedule,
    cli_site,
    recipes,
)
from flows.foreground import leaving, reported
from flows.options import Name, Preset, RecipeFile, Settings

app = typer.Typer(
    help="From a folder or bucket of pictures to a diffusion model behind an HTTP endpoint.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
recipe_app = typer.Typer(help="What a recipe says.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(cli_line.app)
app.add_typer(cli_plan.app)
app.add_typer(cli_schedule.app)
app.add_typer(cli_pictures.app)
app.add_typer(cli_lineage.app)
app.add_typer(cli_models.app)
app.add_typer(cli_load.app)
app.add_typer(cli_site.app)
app.add_typer(cli_data.app, name="data")
cli_data.app.add_typer(cli_quarantine.app, name="quarantine")
app.add_typer(cli_keys.app, name="keys")
app.add_typer(recipe_app, name="recipe")


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
    leaving(app)
