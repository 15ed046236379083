"""What can be known to fail is found before minutes of work.  Each check raises ValueError saying what to change."""

import os
import shutil
import socket
from pathlib import Path
from typing import Literal, get_args

from diffusion.recipe import EvaluateRecipe, Recipe, TrainRecipe, checkpoints_of, grid, student_of, tuned
from diffusion.serving.keys import read as read_keys
from diffusion.store.refs import DatasetRef
from flows.origin import look
from flows.site import Site, ray_is_kept

Until = Literal["register", "deploy"]

PREFECT_PORTS = range(8000, 9000)
FREE_DISK_BYTES = 2 * 2**30  # of a run of the demo, with room for the checkpoints of a few more


def check(
    recipe: Recipe, source: str, until: str, site: Site, dataset: DatasetRef | None = None, init: str | None = None
) -> None:
    """Everything the line needs.  dataset: a published one, in place of the source.  init: see `flows.origin`."""
    if until not in get_args(Until):
        raise ValueError(
            f"until={until!r}: it is one of {', '.join(get_args(Until))}; of one stage type its name, as `diffusion train`"
        )
    from diffusion.data.sources import open_source  # they load torch: not for each start of the program
    from diffusion.training.step import check_sizes

    check_home(site)
    check_training(site, recipe.train)
    look(recipe.train, init, dataset.resolution if dataset else recipe.shard.resolution, site)
    if dataset is None and recipe.shard.holdout == 0:
        raise ValueError(
            "shard.holdout=0 leaves no pictures to judge the model by, so it could not be registered: hold some out, as in"
            " `--set shard.holdout=0.05`"
        )
    if dataset is not None and dataset.holdout == 0:
        raise ValueError(
            f"dataset {dataset.digest[:16]} holds no pictures out to judge the model by, so it could not be registered: make"
            " one that does, as in `diffusion shard --set shard.holdout=0.05`"
        )
    check_drawing(recipe)
    if dataset is not None:
        check_sizes(recipe.train, dataset)
    if dataset is None:
        open_source(source, columns=recipe.shard.columns)
    if recipe.distill.steps:
        student_of(recipe, "0" * 64)  # its teacher, which is not there yet, alone is left out
    if until == "deploy":
        check_serving(site)


def check_drawing(recipe: Recipe) -> None:
    """Every way of drawing that the recipe asks for is possible: averages, noise levels; and it can be measured."""
    from diffusion.spacing import sampling_sigmas  # they load torch
    from diffusion.store.averages import check_averages, wanted_by

    asked = [recipe.evaluate]
    if recipe.sweep.on:
        asked = [tuned(recipe.evaluate, setting) for setting in grid(recipe.sweep, recipe.evaluate)]
    averages = {average for one in asked for average in wanted_by(one, checkpoints_of(recipe.train)[-1]) if average}
    for average in sorted(averages):
        if average.sigma_rel not in recipe.train.ema:
            check_averages(recipe.train, average)
    check_measuring(recipe.evaluate)
    for one in asked:
        sampling_sigmas(one.sampling, one.sampling.steps)


def check_measuring(recipe: EvaluateRecipe) -> None:
    """The networks that pictures are measured with are here, and are those they should be."""
    from diffusion.evaluation.extractors.features import find_weights, identity_of  # they load torch
    from diffusion.store.joint_encoders import joint_identity

    weights = find_weights(recipe.extractor)
    identity_of(recipe.extractor, resolution=recipe.extractor_resolution, weights=weights)
    if recipe.joint != "none":
        joint_identity()


def check_sweep(recipe: Recipe) -> None:
    """There is something to try, and all of it is possible."""
    if not recipe.sweep.on:
        raise ValueError(
            "the recipe names nothing to try: say what, as in `--set sweep.steps=8,12,24 --set sweep.guidance=2.5,4`"
        )
    check_drawing(recipe)


def check_training(site: Site, recipe: TrainRecipe) -> None:
    """The site has what training needs: workers, encoders, and the places of copies and bundles can be asked."""
    from diffusion.store.storage import open_storage

    check_devices(site, recipe)
    check_encoders(recipe)
    for place in (site.runs, site.bundles):
        if place:
            next(open_storage(place).walk(), None)


def check_encoders(recipe: TrainRecipe) -> None:
    """What reads captions and pictures for a network is here, where anything does."""
    from diffusion.store.codecs import codec, identity_for
    from diffusion.store.text_encoders import find_folder

    if recipe.text_encoder != "none":
        find_folder(recipe.text_encoder)
    if identity_for(recipe):
        codec(recipe.codec)  # and what it needs is installed


def check_serving(site: Site) -> None:
    """An endpoint can start, and will not end together with the flow."""
    if site.ray is None and not ray_is_kept():
        raise ValueError(
            "an endpoint needs a Ray that outlives this flow: set DIFFUSION_RAY to a cluster's address, or keep one in the"
            " foreground with `diffusion deploy`"
        )
    check_access(site)
    if site.ray is None:
        check_port(site)


def check_access(site: Site) -> None:
    """Nobody but those with a key asks an endpoint that the network reaches, unless that is wanted."""
    if not read_keys(site.access.keys) and site.access.needed:
        raise ValueError(
            f"host {site.host} is reached from the network, and there are no API keys: make one with `diffusion keys add"
            " NAME`, stay on loopback with DIFFUSION_HOST=127.0.0.1, or let anybody ask with DIFFUSION_OPEN=true"
        )


def check_port(site: Site) -> None:
    """No other program listens on the endpoint's port, or may start to."""
    if site.port in PREFECT_PORTS:
        raise ValueError(
            f"port {site.port}: Prefect's temporary server takes ports from 8000 to 8999 at random; the endpoint's must"
            " lie elsewhere: `--port 7777`"
        )
    with socket.socket(socket.AF_INET6 if ":" in site.host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((site.host, site.port))
        except OSError as error:
            raise ValueError(
                f"cannot listen on {site.host}:{site.port} ({error.strerror}). End the program that does, or choose"
                f" another port: `--port N` or DIFFUSION_PORT=N"
            ) from None


def existing_part(folder: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    return next(parent for parent in (folder, *folder.parents) if parent.exists())


def check_folder(folder: Path, how: str) -> Path:
    """Files can be written into a folder that may not exist yet.  how: to choose another.  Returns what exists of it."""
    nearest = existing_part(folder)
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ValueError(f"{folder} cannot be written: choose another folder with {how}")
    return nearest


def check_empty(folder: Path) -> None:
    """Files can be written into a folder, and it has none that might be the user's only ones."""
    check_folder(folder.absolute(), "`--out DIR`")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"--out {folder} has files in it, and none is overwritten: give a new folder, or an empty one")


def check_home(site: Site, room: int = FREE_DISK_BYTES) -> None:
    """The home can be written, and its disk has so many bytes left."""
    nearest = check_folder(site.home, "`--home DIR` or DIFFUSION_HOME=DIR")
    free = shutil.disk_usage(nearest).free
    if free < room:
        raise ValueError(
            f"{nearest} has {free / 2**30:.1f} GiB free and a run needs about {room / 2**30:.0f}: make room, or"
            " choose another disk with `--home DIR`"
        )


def check_devices(site: Site, recipe: TrainRecipe) -> None:
    """The batch can be divided over the workers, and there are as many GPUs as workers that want one."""
    from diffusion.training.exact import worlds_of  # it loads torch: not for each start of the program
    from diffusion.training.parallel import check_sharding

    if site.shard_weights:
        check_sharding(recipe)
    try:
        workers = worlds_of(recipe, site.train_workers)[0]
    except ValueError as error:
        raise ValueError(
            f"{error}: `--workers` or DIFFUSION_WORKERS. The recipe stays: the batch is part of the experiment, the workers"
            " are not"
        ) from None
    if site.use_gpu and site.ray is None:
        import torch

        if torch.cuda.device_count() < workers:
            raise ValueError(
                f"{workers} workers on GPUs, and this machine has {torch.cuda.device_count()}: `--workers N`, or"
                " DIFFUSION_GPU=false to train on the CPU"
            )
