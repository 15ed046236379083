"""What a plan counts is what the code does, and its arithmetic is the formulas'."""

import math

import pytest
import torch

from diffusion.data.shards import INDEX
from diffusion.evaluation import plan
from diffusion.evaluation.restoration import case_of
from diffusion.guidance import classifier_free
from diffusion.operators import BlockMean
from diffusion.planning import cluster, requests
from diffusion.planning.devices import device_named
from diffusion.planning.foretell import FIXED, Line, Where, foretell, statistics_s
from diffusion.planning.rates import Rates, assumed, reached
from diffusion.planning.requests import Requests
from diffusion.planning.stages import Foretold, Prices, compared
from diffusion.planning.work import (
    INDEX_HEADER,
    Pictures,
    answers_of,
    drawn_by,
    proving_rows,
    rows_of,
    sharding_of,
    training_cost,
)
from diffusion.presets import PRESETS
from diffusion.recipe import Recipe, SamplingRecipe
from diffusion.restore import zero_shot
from diffusion.sampler import Query, run
from diffusion.serving.ladder import prove
from diffusion.spacing import sampling_sigmas
from diffusion.training.plan import plan_of

PICTURES = Pictures((900, 90, 10), 4e6, 5_000.0)
RATES = Rates(decode_s=2e-3, read_s=1e-4, step_s=(0.1, 0.3), answer_s=1e-3, feature_s=1e-3, how="measured")


def line_of(recipe: Recipe, pictures: Pictures = PICTURES, world: int = 2, **facts: object) -> Line:
    side = recipe.shard.resolution
    return Line(
        recipe=recipe,
        pictures=pictures,
        sharding=sharding_of(pictures, recipe.shard),
        answers=answers_of(pictures, recipe, recipe.evaluate),
        training=plan_of(recipe.train, side=side, classes=len(pictures.classes), world=world),
        side=side,
        **facts,
    )


class Counting:
    """A network that answers zeros, and counts the rows it was asked for."""

    def __init__(self) -> None:
        self.rows = 0

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, **_: torch.Tensor) -> torch.Tensor:
        self.rows += len(x)
        return torch.zeros_like(x)


def test_as_many_pictures_are_drawn_as_the_evaluation_draws():
    recipe = PRESETS["demo"]().evaluate
    assert drawn_by(PICTURES, recipe) == len(plan.draws(PICTURES.classes, recipe))


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "heun", "ddim"])
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_as_many_rows_are_asked_for_as_a_sampler_asks(sampler: str, guidance: float):
    from diffusion.sampler import SAMPLERS

    recipe, network = SamplingRecipe(sampler=sampler, guidance=guidance, steps=5), Counting()
    sigmas = sampling_sigmas(recipe, recipe.steps).float()
    conversation = SAMPLERS[sampler](torch.randn(1, 3, 8, 8), sigmas, None)
    if guidance != 1:
        label = {"label": torch.zeros(1, dtype=torch.long)}
        conversation = classifier_free(conversation, label, label, scale=guidance)
    run(conversation, network)
    assert network.rows == rows_of(recipe)


def test_restoring_takes_the_rows_of_a_zero_shot_way():
    recipe, network = PRESETS["demo"](), Counting()
    steps = recipe.evaluate.sampling.steps
    x, operator = torch.randn(1, 3, 8, 8), BlockMean(2)
    sigmas = sampling_sigmas(recipe.evaluate.sampling, steps).float()

    def noise(step: int, stream: object = None) -> torch.Tensor:
        return torch.zeros_like(x)

    run(zero_shot(x, sigmas, noise, operator, operator.forward(x)), network)
    held = round(PICTURES.count * recipe.shard.holdout)
    cases = 5  # enlarging by 2, 4 and 8, filling in, colouring
    assert case_of("inpainting", (8, 8)).name == "inpainting"
    wanted = min(held, recipe.evaluate.restoration_pictures) * cases * network.rows
    assert answers_of(PICTURES, recipe, recipe.evaluate).restoring == wanted


@pytest.mark.parametrize("slots", [4, 32])
def test_proving_asks_for_at_least_so_many_rows(slots: int):
    """At the most two more of the rounds in which the calls are timed."""
    network, largest = Counting(), min(64, 2 ** (2 * slots - 1).bit_length())
    prove(network, lambda rows, trial: Query(torch.randn(rows, 3, 4, 4), torch.ones(rows), {}), largest=largest)
    foretold, round_ = proving_rows(slots), sum(2**k for k in range(1, 7) if 2**k <= largest)
    assert foretold <= network.rows <= foretold + 3 * round_


def test_an_object_in_parts_takes_a_request_for_each_and_three_more():
    assert requests.stored(requests.PART_BYTES) == Requests(put=1)
    assert requests.stored(requests.PART_BYTES + 1) == Requests(put=4, head=1)
    assert requests.fetched(5 * requests.PART_BYTES - 1) == Requests(get=5)
    assert requests.listed(0).list == 1
    assert requests.listed(2_001).list == 3
    both = Requests(get=1, put=2) * 3 + Requests(get=1, delete=9)
    assert both == Requests(get=4, put=6, delete=9)
    assert both.price(1_000, 10) == pytest.approx(6 * 1 + 4 * 0.01)


def test_shards_and_their_indexes_have_the_sizes_that_are_foretold():
    recipe = PRESETS["demo"]().shard
    made = sharding_of(PICTURES, recipe)
    held = round(1_000 * recipe.holdout)
    assert made.shards == math.ceil((1_000 - held) / recipe.shard_size) + math.ceil(held / recipe.shard_size)
    assert made.index_bytes == INDEX.itemsize * recipe.shard_size + INDEX_HEADER
    assert made.written == 1_000 * 5_000


def test_all_the_work_but_the_starts_grows_with_it_and_divides():
    recipe = PRESETS["demo"]()
    where = Where(workers=2, cpus=2)
    one = foretell(line_of(recipe), where, RATES)
    more = foretell(line_of(recipe, Pictures((9_000, 900, 100), 4e7, 5_000.0)), where, RATES)
    assert more.stage("shard").working == pytest.approx(10 * one.stage("shard").working)
    assert more.stage("train").working == one.stage("train").working
    steps = math.ceil(recipe.train.images / recipe.train.batch_size)
    saved = one.stage("train").working - steps * 0.2 / 0.98
    assert 0 < saved < 1  # the last checkpoint
    starts = sum(FIXED[stage.name] * RATES.start_s for stage in one.stages)
    assert one.seconds == pytest.approx(starts + sum(stage.working for stage in one.stages))
    assert all(stage.low <= stage.seconds <= stage.high for stage in one.stages)


def test_the_slowest_of_network_reading_and_fetching_says_how_long_a_step_takes():
    recipe = PRESETS["demo"]()
    line, where = line_of(recipe), Where(workers=2, cpus=2)
    assert foretell(line, where, RATES).bottleneck.waits_for == "the network"
    slow = RATES.model_copy(update={"read_s": 1.0})
    found = foretell(line, where, slow)
    assert found.stage("train").waits_for == found.bottleneck.waits_for == "reading"
    assert found.stage("train").working == pytest.approx(16 * 1.0 * line.training.steps / 0.98, rel=0.01)
    far = where._replace(data_in_bucket=True, copies=0)
    found = foretell(line, far, RATES.model_copy(update={"network_bytes_s": 1_000.0}))
    assert found.stage("train").waits_for == "fetching"
    assert found.stage("train").requests.get > 0


def test_what_is_sharded_is_not_sharded_again_and_a_student_comes_on_top():
    recipe = PRESETS["demo"]()
    where = Where(workers=2, cpus=2)
    done = foretell(line_of(recipe, sharded=True), where, RATES)
    assert done.stage("shard").seconds == 0
    assert "distill" not in [stage.name for stage in done.stages]
    assert foretell(line_of(recipe, deploys=False), where, RATES).stage("deploy") is None


def test_prices_are_of_gpu_hours_bytes_and_requests():
    recipe = PRESETS["demo"]()
    line, where = line_of(recipe), Where(workers=2, cpus=16, gpus=True, data_in_bucket=True)
    free = foretell(line, where, RATES)
    assert free.cost == 0
    gpus = foretell(line, where, RATES, Prices(gpu_hour=36.0))
    assert gpus.stage("train").cost == pytest.approx(2 * free.stage("train").seconds * 0.01)
    assert gpus.stage("shard").cost == 0
    kept = foretell(line, where, RATES, Prices(gb_month=1e9))
    assert kept.stage("shard").cost == pytest.approx(1_000 * 5_000)
    asked = free.stage("shard").requests
    paid = foretell(line, where, RATES, Prices(per_1000=1_000.0, per_1000_reads=0.0))
    assert paid.stage("shard").cost == pytest.approx(asked.put + asked.list)


def test_a_plan_reads_back_and_is_held_against_what_was_taken():
    found = foretell(line_of(PRESETS["smoke"]()), Where(workers=2, cpus=2), RATES)
    assert Foretold.model_validate_json(found.model_dump_json()) == found
    rows = compared(found, {"train": 2 * found.stage("train").seconds, "evaluate": found.stage("evaluate").seconds})
    assert [row.stage for row in rows] == ["train", "evaluate", "all"]
    assert [row.ratio for row in rows[:2]] == pytest.approx([2, 1])
    assert 1 < rows[2].ratio < 2
    assert compared(found, {}) == []


def test_rates_by_formula_are_flops_over_what_a_device_reaches():
    recipe = PRESETS["imagenet64"]()
    flops = training_cost(recipe.train, 64) * 256
    speed = reached(device_named("h100"), 0.4)
    rates = assumed(recipe, step_flops=flops, row_flops=flops / 768, flop_per_s=speed, file_bytes=1e5, on_cpu=False)
    assert rates.step_s == (flops / 395.6e12,)
    with pytest.raises(ValueError, match="b200"):
        device_named("h1000")
    with pytest.raises(ValueError, match="above 0"):
        reached(device_named("h100"), 40)


def test_the_report_of_10_000_pictures_takes_what_was_measured_and_few_take_little():
    assert statistics_s(10_000, 10_000) == pytest.approx(105)
    assert statistics_s(512, 1_700) < 6


def test_the_best_interval_is_where_least_is_lost():
    write, restart, mtbf = 60.0, 300.0, 6 * 3_600.0
    best = cluster.best_interval_s(write, mtbf)
    tried = [cluster.lost_share(interval, write, restart, mtbf) for interval in range(60, 20_000, 10)]
    assert cluster.lost_share(best, write, restart, mtbf) == pytest.approx(min(tried), rel=1e-4)
    assert best == pytest.approx(math.sqrt(2 * write * mtbf), rel=0.05)  # Young's
    assert cluster.best_interval_s(1e6, 10.0) == 10.0
    with pytest.raises(ValueError, match="above 0"):
        cluster.best_interval_s(0, 10)


@pytest.mark.parametrize(("mtbf_min", "best_min"), [(24 * 60, 117), (6 * 60, 57), (15, 9.1)])
def test_the_best_interval_is_the_paper_s(mtbf_min: float, best_min: float):
    """[Daly 2006, Fig. 3 to 5], of checkpoints that take five minutes."""
    assert cluster.best_interval_s(300, 60 * mtbf_min) / 60 == pytest.approx(best_min, rel=0.007)


def test_a_ring_sends_twice_the_bytes_whatever_the_number_of_workers():
    assert cluster.ring_s(1e9, 1, 1e9) == 0
    assert cluster.ring_s(1e9, 2, 1e9) == pytest.approx(1)
    assert cluster.ring_s(1e9, 512, 1e9) == pytest.approx(2, rel=0.01)
    assert cluster.ring_s(0, 5, 1e9, latency_s=1) == 8
