"""The plan of a line: seconds, money, bytes, requests and memory of each stage, and what the whole waits for.

Every number is a count (`work`, `requests`) times a rate (`rates`).  The same operands give the same plan.
"""

from collections.abc import Mapping
from statistics import fmean
from types import MappingProxyType
from typing import NamedTuple

from diffusion.planning import requests
from diffusion.planning.rates import Rates
from diffusion.planning.requests import Requests
from diffusion.planning.stages import Foretold, Prices, Stage, bottleneck_of
from diffusion.planning.work import Answers, Pictures, Sharding, checkpoint_files, seen, training_cost
from diffusion.recipe import EvaluateRecipe, Recipe, TrainRecipe, grid
from diffusion.training.plan import Plan

# What a stage takes beside its work, in units of `Rates.start_s`: measured on two cores, see docs/planning.md
FIXED = {
    "begin": 3.0,
    "shard": 1.5,
    "train": 2.8,
    "sweep": 1.3,
    "evaluate": 1.3,
    "register": 0.2,
    "distill": 2.8,
    "deploy": 1.6,
}
DONE = "nothing: done before"
_FIXED_SPREAD = (0.6, 1.7)
_OVERHEAD = 1 / 0.98  # of a run around its bare steps: README, "training with reader, averages, metrics"
_ENGINE = 1.03  # of the engine around the network: README, "a sampler and guidance"
_PACKED = 1.12  # of the shard stage around decoding and encoding: its tasks, its list, and writing
_DIVIDED = 0.9  # of two times that two workers reach
# Processor seconds of the numbers in a report, for 10,000 drawn and as many real pictures in 1,280 features: a third each
# of 105 s for the eigenvalues, for distances, and for each picture (docs/evaluation.md)
_EIGEN_S, _DISTANCES_S, _PICTURE_S, _DIMENSIONS, _MANY = 35.0, 35.0, 3.5e-3, 1_280, 10_000
_MIB = 2**20
_DRIVER = 160 * _MIB  # of the shard stage: README, "memory of the shard stage's driver"
_CHUNK = 3 * 2**26  # of a worker that decodes: pixels, before and after, and what is encoded
_MEASURING = 330 * _MIB  # of an evaluation: docs/evaluation.md
_LISTINGS = 4  # of the source by `diffusion run`: two checks, the stage, and what it makes


class Where(NamedTuple):
    """The machines, as far as a plan must know them.  cpus: of all together.  copies: bytes of local copies of shards."""

    workers: int
    cpus: int
    nodes: int = 1
    gpus: bool = False
    source_in_bucket: bool = False
    data_in_bucket: bool = False
    runs_in_bucket: bool = False
    copies: float = 20 * 2**30


class Line(NamedTuple):
    """What is planned.  training, student: of the training runs, the second where one is distilled."""

    recipe: Recipe
    pictures: Pictures
    sharding: Sharding
    answers: Answers
    training: Plan
    side: int  # of what the network sees
    taught: tuple[Recipe, Plan, Answers] | None = None
    deploys: bool = True
    sharded: bool = False  # already, so that stage does nothing


def foretell(
    line: Line,
    where: Where,
    rates: Rates,
    prices: Prices = Prices(),
    *,
    starts: Mapping[str, float] = MappingProxyType({}),
    notes: tuple[str, ...] = (),
) -> Foretold:
    """The plan.  starts: how long stages are known to take beside their work, in units of `Rates.start_s`,
    where FIXED says otherwise.  notes: of what was assumed, for people."""
    recipe, answers, known = line.recipe, line.answers, {**FIXED, **starts}
    stages = [_starting(rates)]
    stages.append(_sharding(line, where, rates))
    stages.append(_training("train", recipe.train, line.training, line, where, rates))
    evaluated = (recipe.evaluate, answers, line.training)
    if recipe.sweep.on:
        stages.append(_sweep(line, where, rates))
    stages.append(_evaluating("evaluate", *evaluated, where, rates))
    stages.append(_registering("register", line.training, rates))
    if line.taught:
        taught, student, asked = line.taught
        whole = _training("distill", taught.train, student, line, where, rates)
        more = _evaluating("evaluate", taught.evaluate, asked, student, where, rates)
        stages += [whole, more, _registering("register", student, rates)]
    if line.deploys:
        stages.append(_deploying(answers, rates))
    begun = (_begun(stage, known[stage.name], rates) for stage in stages)
    priced = tuple(_priced(stage, where, prices) for stage in _joined(list(begun)))
    return Foretold(stages=priced, bottleneck=bottleneck_of(priced), how=rates.how, rates=rates, notes=notes)


def _spent(name: str, work: float, rates: Rates, **facts: object) -> Stage:
    """A stage that works for so many seconds, and has not started."""
    low, high = rates.spread
    return Stage(name=name, seconds=work, low=work * low, high=work * high, working=work, **facts)


def _begun(stage: Stage, units: float, rates: Rates) -> Stage:
    """With what it takes to start; of one that has nothing to do that is nothing."""
    if stage.waits_for == DONE:
        return stage
    start = units * rates.start_s
    ends = (start * factor for factor in _FIXED_SPREAD)
    times = zip(("seconds", "low", "high"), (start, *ends), strict=True)
    return stage.model_copy(update={name: getattr(stage, name) + more for name, more in times})


def _starting(rates: Rates) -> Stage:
    return _spent("begin", 0.0, rates, waits_for="starting programs")


def _sharding(line: Line, where: Where, rates: Rates) -> Stage:
    made, count = line.sharding, line.pictures.count
    if line.sharded:
        return Stage(name="shard", seconds=0, low=0, high=0, working=0, waits_for=DONE)
    cores = 1 + (where.cpus - 1) * _DIVIDED
    decoding = _PACKED * count * rates.decode_s / (cores * rates.core)
    fetching = line.pictures.file_bytes / (rates.network_bytes_s * where.nodes) if where.source_in_bucket else 0.0
    sent = 2 * made.written / (rates.network_bytes_s * where.nodes) if where.data_in_bucket else 0.0
    writing = 2 * made.written / (rates.disk_bytes_s * where.nodes) + sent
    asked = Requests()
    if where.source_in_bucket:
        asked += requests.source_read(count, _LISTINGS)
    if where.data_in_bucket:
        asked += requests.shards_made(
            count,
            chunks=made.chunks,
            chunk_bytes=made.chunk_bytes,
            shards=made.shards,
            shard_bytes=made.shard_bytes,
            index_bytes=made.index_bytes,
        )
    parts = {"decoding": decoding, "fetching": fetching, "writing": writing}
    slowest = max(parts, key=parts.get)
    # workers wait for the network with other files' decoding; what is written waits for the last picture
    return _spent(
        "shard",
        max(decoding, fetching) + writing,
        rates,
        waits_for=slowest,
        written=made.written,
        requests=asked,
        memory=max(_DRIVER, _CHUNK),
    )


def step_parts(line: Line, recipe: TrainRecipe, where: Where, rates: Rates) -> dict[str, float]:
    """Seconds of a step on what it may wait for: the network (with the exchange of gradients), reading, fetching."""
    share = recipe.batch_size / where.workers
    cost = training_cost(recipe, line.side) / training_cost(line.recipe.train, line.side)
    parts = {"the network": fmean(rates.step_s) * cost, "reading": share * rates.read_s / rates.core}
    small = line.sharding.written <= where.copies
    if where.data_in_bucket and not (small and seen(recipe) > 4 * line.pictures.count):
        # every machine fetches all shards once an epoch, and each part of a batch with the others: docs/scale.md
        parts["fetching"] = recipe.batch_size * line.pictures.stored_bytes / rates.network_bytes_s
    return parts


def _training(name: str, recipe: TrainRecipe, plan: Plan, line: Line, where: Where, rates: Rates) -> Stage:
    parts = step_parts(line, recipe, where, rates)
    slowest = max(parts, key=parts.get)
    saving = plan.checkpoint_bytes / rates.disk_bytes_s  # beside training, but for the last
    written = plan.checkpoints * plan.checkpoint_bytes
    made, epochs = line.sharding, seen(recipe) / max(1, line.pictures.count)
    asked = Requests()
    if where.data_in_bucket:
        asked += requests.training_read(
            workers=where.workers,
            nodes=where.nodes,
            shards=made.shards,
            shard_bytes=made.shard_bytes,
            index_bytes=made.index_bytes,
            epochs=epochs,
            cache_bytes=where.copies,
        )
    if where.runs_in_bucket:
        files = checkpoint_files(recipe, 4 * plan.parameters, plan.checkpoint_bytes)
        asked += requests.checkpoints_copied(files, plan.checkpoints)
    work = plan.steps * parts[slowest] * _OVERHEAD + saving
    return _spent(name, work, rates, waits_for=slowest, written=written, requests=asked, memory=plan.memory.total)


def _evaluating(name: str, recipe: EvaluateRecipe, asked: Answers, plan: Plan, where: Where, rates: Rates) -> Stage:
    drawing = _ENGINE * (asked.proving + asked.divided / where.workers) * rates.answer_s
    extracting = asked.extracted * (rates.feature_s + rates.read_s / rates.core) / where.workers
    comparing = statistics_s(recipe.samples, asked.compared) / rates.core
    parts = {"drawing": drawing, "extracting": extracting, "comparing": comparing}
    weights = 4 * plan.parameters
    features = (asked.drawn + asked.compared) * _DIMENSIONS * 4
    return _spent(
        name,
        sum(parts.values()),
        rates,
        waits_for=max(parts, key=parts.get),
        written=weights + features,
        memory=_MEASURING + weights,
    )


def statistics_s(samples: int, compared: int) -> float:
    """Processor seconds of the numbers of a report."""
    known = min(samples, _DIMENSIONS) / _DIMENSIONS
    pairs = samples * (samples + compared) / (2 * _MANY**2)
    return _EIGEN_S * known**3 + _DISTANCES_S * pairs + _PICTURE_S * samples


def _sweep(line: Line, where: Where, rates: Rates) -> Stage:
    """All settings draw the first samples; what more are drawn of depends on what is seen."""
    sweep, one = line.recipe.sweep, line.answers
    rows = one.drawing / max(1, one.drawn) * rates.answer_s * _ENGINE / where.workers
    settings = len(grid(sweep, line.recipe.evaluate))
    least, most = settings * sweep.first_samples * rows, settings * sweep.samples * rows
    proving = one.proving * rates.answer_s
    stage = _spent("sweep", (least + most) / 2 + proving, rates, waits_for="drawing", memory=_MEASURING)
    low, high = rates.spread
    half = (most - least) / 2
    return stage.model_copy(update={"low": stage.low - low * half, "high": stage.high + high * half})


def _registering(name: str, plan: Plan, rates: Rates) -> Stage:
    weights = 4 * plan.parameters
    work = 2 * weights / rates.disk_bytes_s
    return _spent(name, work, rates, waits_for="writing", written=weights)


def _deploying(asked: Answers, rates: Rates) -> Stage:
    return _spent("deploy", asked.proving * rates.answer_s, rates, waits_for="proving")


def _joined(stages: list[Stage]) -> list[Stage]:
    """Stages of one name as one, in the place of the first."""
    found: dict[str, Stage] = {}
    for stage in stages:
        found[stage.name] = found[stage.name].plus(stage) if stage.name in found else stage
    return list(found.values())


def _priced(stage: Stage, where: Where, prices: Prices) -> Stage:
    on_gpus = where.gpus and stage.name in ("train", "distill", "evaluate", "sweep")
    money = prices.of(gpu_s=stage.seconds * where.workers * on_gpus, stored=stage.written, requests=stage.requests)
    return stage.model_copy(update={"cost": money})
