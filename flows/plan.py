"""`diffusion plan`: what is known of pictures, recipe and machines becomes a plan, which is told and noted."""

import math
import os
from collections.abc import Callable
from typing import NamedTuple

from diffusion.data import manifest
from diffusion.data.dry_run import SAMPLE, DryRun, dry_run
from diffusion.data.open_shards import INDEX_BYTES, OPEN_SHARDS
from diffusion.planning import cluster
from diffusion.planning.devices import device_named
from diffusion.planning.foretell import Line, Where, foretell
from diffusion.planning.probe import NoProbe, disk_bytes_s, probe
from diffusion.planning.rates import START_S, Rates, assumed, reached
from diffusion.planning.stages import Failures, Foretold, Prices
from diffusion.planning.work import (
    Pictures,
    answer_cost,
    answers_of,
    assumed_bytes,
    sharding_of,
    shards_at_once,
    training_cost,
)
from diffusion.recipe import Recipe, ShardRecipe, student_of
from diffusion.store.refs import DatasetRef
from diffusion.store.storage import S3_SCHEME, open_storage
from diffusion.training.exact import worlds_of
from diffusion.training.plan import Plan, plan_of
from flows.plan_notes import starts_of
from flows.site import Site

_READER = 0.7  # of the decoder's pace that a reader has around it: README, "decoding 32 px PNGs to batches"
_CPUS = 8  # beside each GPU of a machine that is not here
_CPU_MFU, _GPU_MFU = 0.55, 0.4  # of a measured peak; README, "its share of the measured bf16 peak"
_NO_TEACHER = "0" * 64
_RESTART = 5  # starts of a program: until workers are replaced and train again


class Options(NamedTuple):
    """What a person says of machines and pictures."""

    pictures: int | None = None
    file_bytes: float | None = None  # of all
    probed: bool = True
    device: str | None = None
    mfu: float = _GPU_MFU
    per_machine: int = 8
    network_gbit: float = 10.0
    mtbf_hours: float | None = None  # until one worker fails
    deploys: bool = True


class Known(NamedTuple):
    """Pictures, and what looking at some of them took; None where none were looked at."""

    pictures: Pictures
    sharded: bool
    decode_s: float | None = None
    read_s: float | None = None
    notes: tuple[str, ...] = ()


def known_of(
    recipe: ShardRecipe,
    source: str,
    dataset: DatasetRef | None,
    site: Site,
    asked: Options,
    progress: Callable[[int, int], None] | None = None,
) -> Known:
    """dataset: a published one, in place of the source.  Raises BadSource."""
    if asked.pictures is not None:
        said = asked.file_bytes
        size = said if said is not None else asked.pictures * assumed_bytes(recipe)
        notes = ("pictures: as you say; bytes in a shard by formula",)
        return Known(Pictures((asked.pictures,), size, assumed_bytes(recipe)), False, notes=notes)
    if dataset is not None:
        return Known(pictures_of(dataset), True, notes=(f"pictures: those of the dataset {dataset.digest[:16]}",))
    sample = SAMPLE if asked.probed else 0
    root = open_storage(site.data_root)
    found = dry_run(source, recipe, root, fresh=True, sample=sample, progress=progress)
    return _looked_at(found, recipe)


def pictures_of(dataset: DatasetRef) -> Pictures:
    """Of a published dataset."""
    made = manifest.load(dataset.uri, digest=dataset.digest)
    classes = tuple(a + b for a, b in zip(made.train_counts, made.holdout_counts, strict=True))
    stored = sum(entry.bytes for entry in made.shards)
    return Pictures(classes, stored, stored / max(1, sum(classes)))


def _looked_at(found: DryRun, recipe: ShardRecipe) -> Known:
    source, sampled = found.source, found.sampled
    kept = sampled.files - sum(sampled.rejected.values())
    share = kept / max(1, sampled.files)
    classes = tuple(max(1, round(count * share)) for count in source["classes"].values())
    stored = sampled.bytes / kept if kept else assumed_bytes(recipe)
    size = source["bytes"] if source["bytes"] is not None else source["pictures"] * stored
    notes = (f"pictures: {source['pictures']:,} listed, {sampled.files:,} of them decoded",)
    if not kept:
        return Known(Pictures(classes, size, stored), False, notes=notes)
    return Known(
        Pictures(classes, size, stored), False, sampled.seconds / kept, sampled.reading / kept / _READER, notes
    )


def world_of(recipe: Recipe, site: Site, asked: Options) -> int:
    """How many workers train.  Raises ValueError where they cannot divide the batch."""
    given = site.workers or 1 if asked.device else site.train_workers
    return worlds_of(recipe.train, given)[-1]


def where_of(recipe: Recipe, source: str, site: Site, asked: Options) -> Where:
    """The machines: this one, or those of the device that is named."""
    world = world_of(recipe, site, asked)
    gpus = asked.device is not None or site.use_gpu
    nodes = math.ceil(world / asked.per_machine) if gpus else 1
    return Where(
        workers=world,
        cpus=_CPUS * world if asked.device else os.cpu_count() or 1,
        nodes=nodes,
        gpus=gpus,
        source_in_bucket=source.startswith(S3_SCHEME),
        data_in_bucket=site.data_root.startswith(S3_SCHEME),
        runs_in_bucket=bool(site.runs and site.runs.startswith(S3_SCHEME)),
        copies=site.shard_copies_mib * 2.0**20,
    )


def line_of(recipe: Recipe, known: Known, where: Where, site: Site, *, deploys: bool) -> Line:
    """Raises ValueError where the recipe cannot be trained on so many workers."""
    side = recipe.shard.resolution // recipe.train.codec_factor
    classes = len(known.pictures.classes)

    def planned(one: Recipe) -> Plan:
        return plan_of(
            one.train,
            side=side,
            classes=classes,
            world=where.workers,
            recompute=site.recompute,
            sharded=site.shard_weights,
        )

    taught = None
    if recipe.distill.steps:
        student = student_of(recipe, _NO_TEACHER)
        asked = answers_of(known.pictures, student, student.evaluate, student=True)
        taught = student, planned(student), asked
    return Line(
        recipe=recipe,
        pictures=known.pictures,
        sharding=sharding_of(known.pictures, recipe.shard),
        answers=answers_of(known.pictures, recipe, recipe.evaluate),
        training=planned(recipe),
        side=side,
        taught=taught,
        deploys=deploys,
        sharded=known.sharded,
    )


def rates_of(line: Line, known: Known, where: Where, site: Site, asked: Options) -> tuple[Rates, tuple[str, ...]]:
    """By formula, and in the place of what a probe measured that; with notes for people."""
    network = asked.network_gbit * 1e9 / 8
    by_formula, notes = _by_formula(line, where, site, asked, network)
    if known.decode_s is not None:
        by_formula = by_formula.model_copy(update={"decode_s": known.decode_s, "read_s": known.read_s})
    if asked.device or not asked.probed:
        return by_formula, notes
    recipe, plan = line.recipe, line.training
    here = min(where.workers, _devices(site))
    try:
        disk = disk_bytes_s(site.home)
        tried = probe(
            recipe,
            resolution=recipe.shard.resolution,
            classes=len(line.pictures.classes),
            world=here,
            share=plan.share,
            step_flops=training_cost(recipe.train, line.side) * plan.share,
            threads=site.threads,
            gpu=site.use_gpu,
        )
    except NoProbe as error:
        return by_formula, (*notes, f"not measured: {error}")
    measured = {
        "start_s": tried.start_s,
        "step_s": tried.step_s,
        "answer_s": tried.answer_s,
        "core": tried.core,
        "disk_bytes_s": disk,
        "how": "measured",
    }
    if tried.feature_s is not None:
        measured["feature_s"] = tried.feature_s
    words = f"steps, answers and starts: measured on {here} processes at once"
    return by_formula.model_copy(update=measured), (words,)


def _by_formula(line: Line, where: Where, site: Site, asked: Options, network: float) -> tuple[Rates, tuple[str, ...]]:
    recipe, plan = line.recipe, line.training
    exchanged = plan.gradient_bytes + plan.update_bytes / 2  # what is sent once counts half of what is summed
    if asked.device:
        device = device_named(asked.device)
        speed = reached(device, asked.mfu)
        link = min(device.link_bytes_s, network) if where.nodes > 1 else device.link_bytes_s
        note = f"{device.name}: {device.flop_per_s / 1e12:,.0f} TFLOP/s in bf16, of which {asked.mfu:.0%} are reached"
    else:
        speed, link = _reached_here(where, site), network
        note = f"FLOPs at {speed / 1e9:,.0f} GFLOP/s on each worker, a share of the measured peak"
    rates = assumed(
        recipe,
        step_flops=training_cost(recipe.train, line.side) * plan.share,
        row_flops=answer_cost(recipe.train, line.side),
        flop_per_s=speed,
        file_bytes=line.pictures.file_bytes / max(1, line.pictures.count),
        on_cpu=not where.gpus,
        exchange_s=cluster.ring_s(exchanged, where.workers, link),
        network_bytes_s=network,
    )
    return rates, (note, f"a start takes {START_S:g} s, other rates as in docs/planning.md")


def _devices(site: Site) -> int:
    """How many processes can work here at once."""
    if not site.use_gpu:
        return os.cpu_count() or 1
    import torch

    return max(1, torch.cuda.device_count())


def _reached_here(where: Where, site: Site) -> float:
    """FLOP/s of a worker here, by the device's measured peak: under a second."""
    import torch

    from diffusion.peak import peaks

    if where.gpus:
        return _GPU_MFU * max(peaks(torch.bfloat16, "cuda").values())
    return _CPU_MFU * max(peaks(torch.bfloat16).values()) * site.threads / torch.get_num_threads()


def planned(
    recipe: Recipe,
    source: str,
    dataset: DatasetRef | None,
    site: Site,
    asked: Options,
    prices: Prices,
    progress: Callable[[int, int], None] | None = None,
) -> Foretold:
    """The plan of a line from nothing.  Raises ValueError where it could not be done."""
    known = known_of(recipe.shard, source, dataset, site, asked, progress)
    where = where_of(recipe, source, site, asked)
    line = line_of(recipe, known, where, site, deploys=asked.deploys)
    rates, notes = rates_of(line, known, where, site, asked)
    notes = (*known.notes, *notes, *_warnings(line, where))
    plan = foretell(line, where, rates, prices, starts=starts_for(site, asked), notes=notes)
    if asked.mtbf_hours is None:
        return plan
    return plan.model_copy(update={"failures": failing(plan, line, where, asked.mtbf_hours)})


def starts_for(site: Site, asked: Options) -> dict[str, float]:
    """Those of the runs here; of machines that are not here none are known."""
    return {} if asked.device else starts_of(site)


def _warnings(line: Line, where: Where) -> tuple[str, ...]:
    """What would go badly, and what to change."""
    recipe, room = line.recipe, min(OPEN_SHARDS, INDEX_BYTES // max(1, round(line.sharding.index_bytes)))
    at_once = min(line.sharding.shards, shards_at_once(recipe.train, recipe.shard.shard_size))
    warnings = []
    if where.data_in_bucket and at_once > room:
        warnings.append(
            f"beware: a worker reads in {at_once:,} shards by turns and holds {room:,} open, so most pictures cost a request"
            " for an index: lower train.window or train.streams (docs/scale.md)"
        )
    return tuple(warnings)


def failing(plan: Foretold, line: Line, where: Where, mtbf_hours: float) -> Failures:
    """What failures cost a run, one of whose workers fails every `mtbf_hours`.  A checkpoint is counted as if training stood
    still until it is on the disk, which is the most that it can cost."""
    training = line.training
    write, mtbf = training.checkpoint_bytes / plan.rates.disk_bytes_s, mtbf_hours * 3_600 / where.workers
    own = plan.stage("train").working / training.checkpoints
    best, restart = cluster.best_interval_s(write, mtbf), _RESTART * plan.rates.start_s
    lost = (cluster.lost_share(interval, write, restart, mtbf) for interval in (own, best))
    return Failures(mtbf_s=mtbf, own_s=own, best_s=best, own_lost=next(lost), best_lost=next(lost))
