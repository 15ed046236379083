"""The command `plan`: what a run of the line would take, before it is started."""

from typing import Annotated

import typer

from diffusion.recipe import Recipe
from flows.command import EMBEDDED, do, named_dataset
from flows.console import progress, say
from flows.foreground import guarded
from flows.options import Dataset, Debug, Home, Name, Preset, RecipeFile, Settings, Source, Workers
from flows.site import Site

app = typer.Typer()

_GB = 1e9


@app.command()
def plan(
    preset: Preset = "demo",
    source: Source = None,
    dataset: Dataset = None,
    settings: Settings = None,
    recipe_file: RecipeFile = None,
    name: Name = None,
    home: Home = None,
    workers: Workers = None,
    pictures: Annotated[
        int | None, typer.Option("--pictures", min=1, help="So many pictures, instead of looking at a source.")
    ] = None,
    gigabytes: Annotated[
        float | None, typer.Option("--gigabytes", min=0, help="With --pictures: what their files have in all.")
    ] = None,
    probe: Annotated[
        bool, typer.Option("--probe/--no-probe", help="Try a few steps of the network here, or reckon by formula.")
    ] = True,
    device: Annotated[
        str | None, typer.Option("--device", help="GPU that is not here: a100, h100, h200, b200, l40s, l4.")
    ] = None,
    mfu: Annotated[float, typer.Option("--mfu", help="With --device: share of its FLOP/s that is reached.")] = 0.4,
    per_machine: Annotated[int, typer.Option("--per-machine", min=1, help="With --device: GPUs of one machine.")] = 8,
    network_gbit: Annotated[
        float, typer.Option("--network-gbit", min=0.001, help="Gbit/s of a machine, to others and to buckets.")
    ] = 10.0,
    mtbf_hours: Annotated[
        float | None, typer.Option("--mtbf-hours", min=0.1, help="Hours until one worker fails; says what that costs.")
    ] = None,
    gpu_hour: Annotated[float, typer.Option("--gpu-hour", min=0, help="Price of a GPU for an hour.")] = 0.0,
    gb_month: Annotated[float, typer.Option("--gb-month", min=0, help="Price of 10^9 bytes for a month.")] = 0.0,
    per_1000: Annotated[
        float, typer.Option("--per-1000-requests", min=0, help="Price of a thousand requests that write or list.")
    ] = 0.0,
    per_1000_reads: Annotated[
        float | None,
        typer.Option("--per-1000-reads", min=0, help="Price of a thousand that read. [as those that write]"),
    ] = None,
    until: Annotated[str, typer.Option("--until", help="Last stage: register, or deploy.")] = "deploy",
    json: Annotated[bool, typer.Option("--json", help="All numbers, for programs.")] = False,
    debug: Debug = False,
) -> None:
    """Say what `run` would take with the same options: time, money, storage, requests, memory, and what it would wait for.

    A few real steps are tried on this machine, unless --no-probe or --device says otherwise.  Nothing is trained or
    published; `run` is held against the plan that was made last.
    """

    def work(recipe: Recipe, site: Site) -> None:
        from flows import plan as planning  # they load torch
        from flows.plan_notes import note
        from flows.plan_told import as_json, told

        asked = planning.Options(
            pictures=pictures,
            file_bytes=None if gigabytes is None else gigabytes * _GB,
            probed=probe,
            device=device,
            mfu=mfu,
            per_machine=per_machine,
            network_gbit=network_gbit,
            mtbf_hours=mtbf_hours,
            deploys=until == "deploy",
        )
        _check(source, dataset, pictures, gigabytes, until)
        prices = planning.Prices(gpu_hour=gpu_hour, gb_month=gb_month, per_1000=per_1000, per_1000_reads=per_1000_reads)
        given = named_dataset(dataset, source, site)
        where = source or EMBEDDED
        if json:
            found = planning.planned(recipe, where, given, site, asked, prices)
        else:
            with progress("looking", "pictures") as update:
                found = planning.planned(recipe, where, given, site, asked, prices, update)
        if device is None and pictures is None:
            note(found, recipe, where, site)
        if json:
            say(as_json(found))
            return
        told(found, priced=any((gpu_hour, gb_month, per_1000, per_1000_reads)))

    do(work, debug, preset, recipe_file, settings, name, run=guarded, home=home, workers=workers)


def _check(source: str | None, dataset: str | None, pictures: int | None, gigabytes: float | None, until: str) -> None:
    if pictures is not None and (source or dataset):
        raise ValueError(f"--pictures {pictures} and {'--source' if source else '--dataset'}: give one of the two")
    if gigabytes is not None and pictures is None:
        raise ValueError("--gigabytes goes with --pictures: a source that is named is looked at")
    if until not in ("register", "deploy"):
        raise ValueError(f"--until {until}: it is one of register, deploy")
