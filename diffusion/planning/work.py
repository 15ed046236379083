"""What the stages of a line do, counted from its recipe and its pictures: files, steps, answers of the network, bytes."""

import math
from typing import NamedTuple

from diffusion.data.shards import INDEX
from diffusion.degradation import FACTORS
from diffusion.evaluation.metrics.splits import allocate
from diffusion.evaluation.reference import LIMIT
from diffusion.flops import training_flops, unet_flops
from diffusion.recipe import EvaluateRecipe, Recipe, SamplingRecipe, ShardRecipe, TrainRecipe, checkpoints_of
from diffusion.restore import REPEATS, TRAINED_STEPS
from diffusion.sampler import evaluations
from diffusion.serving.ladder import LARGEST, REFERENCE

INDEX_HEADER = 384  # bytes of a .npy with these columns, at the most


class Pictures(NamedTuple):
    """What is to become a dataset, or has become one.

    classes: how many of each.  file_bytes: of the files.  stored_bytes: of one picture in a shard, with what the tar adds.
    """

    classes: tuple[int, ...]
    file_bytes: float
    stored_bytes: float

    @property
    def count(self) -> int:
        return sum(self.classes)


class Sharding(NamedTuple):
    """What the shard stage makes."""

    pictures: int
    shards: int  # of both splits
    shard_bytes: float  # of a full one
    index_bytes: float
    picture_bytes: float
    chunks: int
    chunk_bytes: float

    @property
    def written(self) -> float:
        """Bytes of the dataset."""
        return self.pictures * self.picture_bytes


class Answers(NamedTuple):
    """Rows that the network is asked for, without gradients, and pictures that go through the extractor."""

    drawn: int  # pictures
    drawing: int  # rows
    restoring: int
    losses: int  # of held-out pictures, and of the bound
    proving: int  # by each worker, before it draws
    extracted: int  # pictures
    compared: int  # real pictures that the drawn ones are compared with

    @property
    def divided(self) -> int:
        """Rows that the workers share."""
        return self.drawing + self.restoring + self.losses


def assumed_bytes(recipe: ShardRecipe) -> float:
    """Of a picture in a shard, where none was looked at: photographs take 1.6 bytes a pixel as PNG and 0.5 as JPEG,
    and a sample 2.5 KiB beside."""
    return recipe.resolution**2 * (0.5 if recipe.encoding == "jpeg" else 1.6) + 2_560


def sharding_of(
    pictures: Pictures, recipe: ShardRecipe, *, chunk_files: int = 256, chunk_bytes: int = 2**26
) -> Sharding:
    """chunk_files, chunk_bytes: as `data.ingest` cuts the work."""
    held = round(pictures.count * recipe.holdout)
    shards = sum(math.ceil(count / recipe.shard_size) for count in (pictures.count - held, held))
    chunk = min(chunk_files, max(1, chunk_bytes // (3 * recipe.resolution**2)))
    return Sharding(
        pictures=pictures.count,
        shards=shards,
        shard_bytes=pictures.stored_bytes * min(recipe.shard_size, max(1, pictures.count)),
        index_bytes=INDEX.itemsize * min(recipe.shard_size, max(1, pictures.count)) + INDEX_HEADER,
        picture_bytes=pictures.stored_bytes,
        chunks=math.ceil(pictures.count / chunk),
        chunk_bytes=chunk * pictures.stored_bytes,
    )


def shards_at_once(recipe: TrainRecipe, shard_size: int) -> int:
    """In how many shards a worker reads by turns: in each stream those of a window, which seldom begins with a shard."""
    return recipe.streams * (math.ceil(recipe.window / shard_size) + 1)


def answers_of(pictures: Pictures, recipe: Recipe, evaluate: EvaluateRecipe, *, student: bool = False) -> Answers:
    """What an evaluation asks for.  student: whether of a model that draws in few steps, and does no more."""
    drawn, train = drawn_by(pictures, evaluate), recipe.train
    per_picture = rows_of(evaluate.sampling)
    held = round(pictures.count * recipe.shard.holdout)
    restored = 0 if student or train.codec != "none" else min(held, evaluate.restoration_pictures)
    cases = _restorations(recipe, evaluate)
    measured = min(held, evaluate.loss_pictures) if not student else 0
    bound = measured * (evaluate.bound_draws + 1) if evaluate.bound_steps and train.codec == "none" else 0
    compared = min(LIMIT, pictures.count - held)
    return Answers(
        drawn=drawn,
        drawing=drawn * per_picture,
        restoring=restored * sum(cases),
        losses=measured * len(evaluate.loss_levels) + bound,
        proving=proving_rows(evaluate.batch_size),
        extracted=min(evaluate.samples, drawn) + compared + min(LIMIT, held) + 3 * restored * len(cases),
        compared=compared,
    )


def drawn_by(pictures: Pictures, evaluate: EvaluateRecipe) -> int:
    """Pictures that are drawn: the samples, and what else the grid of each class needs (`evaluation.plan.draws`)."""
    counts = list(pictures.classes) or [1]
    return sum(max(measured, evaluate.grid_columns) for measured in allocate(counts, evaluate.samples))


def rows_of(sampling: SamplingRecipe) -> int:
    """Rows that one picture asks the network for."""
    guided = 1 if sampling.guidance == 1 else 2
    return evaluations(sampling.sampler, sampling.steps) * guided


def proving_rows(slots: int) -> int:
    """Rows that `serving.ladder.prove` asks for, at least: every size twice over the same rows, the reference before, and a
    round of measuring."""
    largest = min(LARGEST, 2 ** (2 * slots - 1).bit_length())
    sizes = [2**k for k in range(1, LARGEST.bit_length()) if 2**k <= largest]
    pool = max(*sizes, REFERENCE)
    return 2 * pool * (len({*sizes, REFERENCE}) + 1) + sum(sizes)


def _restorations(recipe: Recipe, evaluate: EvaluateRecipe) -> list[int]:
    """Rows that restoring one picture takes, of each task that is measured (`evaluation.restoration`)."""
    sampling, trained = evaluate.sampling, recipe.train.degradations
    factors = [factor for factor in FACTORS if recipe.shard.resolution % factor == 0]
    tasks = ["super-resolution"] * len(factors) + ["inpainting", "colorization"]
    zero_shot = REPEATS * sampling.steps
    learned = evaluations(sampling.sampler, TRAINED_STEPS)
    return [learned if task in trained else zero_shot for task in tasks]


def training_cost(recipe: TrainRecipe, side: int) -> float:
    """FLOPs of one picture in training, forward and backward."""
    return float(training_flops(recipe, side=side, tokens=recipe.text_tokens if recipe.unet.text_width else 0))


def answer_cost(recipe: TrainRecipe, side: int) -> float:
    """FLOPs of one row of an answer."""
    tokens = recipe.text_tokens if recipe.unet.text_width else 0
    return float(unet_flops(recipe.unet, resolution=side, tokens=tokens, picture_channels=recipe.codec_channels))


def checkpoint_files(recipe: TrainRecipe, weights: float, whole: float) -> dict[str, float]:
    """Name -> bytes of what a checkpoint consists of.  weights, whole: bytes of the weights, and of all."""
    files = {"weights": weights, "state": 4_096.0, "manifest": 2_048.0}
    files |= {f"ema-{width}": weights for width in recipe.ema}
    files["optimizer"] = max(0.0, whole - weights * (1 + len(recipe.ema)))
    if recipe.weight == "uncertainty":
        files["uncertainty"] = 4_096.0
    return files


def seen(recipe: TrainRecipe) -> int:
    """Pictures that a run sees."""
    return checkpoints_of(recipe)[-1]
