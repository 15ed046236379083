"""Recipes: everything that changes a number, typed, frozen and hashed.  Where things run is `flows.site`, which is not."""

import hashlib
import json
import math
from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
SamplerName = Literal["heun", "ddim", "dpmpp_2m", "unipc", "ddpm", "ddpm_beta", "dpmpp_2m_sde", "heun_churn"]
DETERMINISTIC: tuple[SamplerName, ...] = ("heun", "ddim", "dpmpp_2m", "unipc")
PredictionName = Literal["edm", "epsilon", "v", "x0"]
ChainName = Literal["linear", "cosine", "source-text"]
GuidanceKind = Literal["classifier_free", "autoguidance"]
TaskName = Literal["super-resolution", "inpainting", "colorization"]


class Frozen(BaseModel):
    """A small value that never changes; unknown keys and non-finite numbers are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def first_mistake(error: ValueError) -> str:
    """What is wrong, in a line; of what pydantic found the first, and where."""
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors(include_url=False)[0]
    return f"{'.'.join(map(str, first['loc'])) or 'the file'}: {mistake(first)}"


_MISTAKES = {  # of pydantic, whose own words are for programmers
    "int_type|int_parsing|int_parsing_size|int_from_float": "it is no whole number",
    "float_type|float_parsing": "it is no number",
    "finite_number": "it is no finite number",
    "bool_type|bool_parsing": "it is neither true nor false",
    "string_type|string_unicode": "it is no text",
    "list_type|tuple_type": "it is no list",
    "dict_type|model_type|model_attributes_type": "it is no object with names and values",
    "greater_than_equal": "it must be at least {ge}",
    "greater_than": "it must be above {gt}",
    "less_than_equal": "it must be at most {le}",
    "less_than": "it must be below {lt}",
    "multiple_of": "it must be a multiple of {multiple_of}",
    "literal_error": "it must be {expected}",
    "string_pattern_mismatch": "it must match {pattern}",
    "string_too_short": "it must have at least {min_length} characters",
    "string_too_long": "it must have at most {max_length} characters",
    "too_short": "it must have at least {min_length} items",
    "too_long": "it must have at most {max_length} items",
    "missing": "it is missing",
    "extra_forbidden": "it is not known",
    "json_invalid": "it is no JSON ({error})",
}


def mistake(found: dict) -> str:
    """One of pydantic's `errors()`, in words for people."""
    for kinds, words in _MISTAKES.items():
        if found["type"] in kinds.split("|"):
            return words.format(**found.get("ctx", {}))
    return found["msg"].removeprefix("Value error, ")


def unset(value: object) -> bool:
    """For `exclude_if`: a field that says nothing is not written, so values of before it existed keep their bytes."""
    return value is None or value == ()


def usual(default: object) -> Callable[[object], bool]:
    """For `exclude_if`, likewise: a field is not written at the value that held before it existed."""
    return lambda value: value == default


def canonical_json(value: BaseModel | dict | list) -> bytes:
    """The one byte string of a value: sorted keys, no spaces, UTF-8.  Equal values have equal bytes."""
    return _canonical(value.model_dump(mode="json") if isinstance(value, BaseModel) else value).encode()


# kept: json.dumps with options makes an encoder anew each time, which takes longer than a sample's facts
_canonical = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode


def digest_of(value: BaseModel | dict | list) -> str:
    """sha256 (64 hex digits) of the canonical JSON: the identity of a recipe, a manifest, a request."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


class Columns(Frozen):
    """Which columns of a table of pictures hold what.  None and () mean the usual names; see docs/sources.md."""

    image: str | None = Field(
        None, exclude_if=unset, description="Column of paths, or of pictures; none: image, path, file_name and others"
    )
    label: str | None = Field(None, exclude_if=unset, description="Column of classes; none: label or class")
    captions: tuple[str, ...] = Field((), exclude_if=unset, description="Columns of captions; none: text or caption(s)")
    weights: tuple[str, ...] = Field(
        (), exclude_if=unset, description="Columns of the captions' weights, one for each; none: weight(s)"
    )
    root: str | None = Field(
        None, exclude_if=unset, description="Folder or s3://bucket/prefix that paths start from; none: the table's"
    )

    @model_validator(mode="after")
    def _checks(self) -> "Columns":
        if self.weights and len(self.weights) != len(self.captions):
            raise ValueError(
                f"columns: {len(self.weights)} weights for {len(self.captions)} captions: name one column of weights for"
                " each column of captions"
            )
        return self


class ShardRecipe(Frozen):
    """From pictures to shards."""

    resolution: int = Field(64, ge=8, le=1024, multiple_of=8, description="Side of the square picture, pixels")
    background: str = Field("#ffffff", pattern=r"^#[0-9a-f]{6}$", description="Colour transparency is composited on")
    shard_size: int = Field(256, ge=1, le=100_000, description="Pictures per shard; the last of a split has the rest")
    holdout: Share = Field(0.05, description="Share of the pictures held out of training, chosen by content hash")
    max_rejected: Share = Field(0.1, description="Stop when a larger share of the files cannot be used")
    min_side: int = Field(
        1, ge=1, exclude_if=usual(1), description="Pictures whose shorter side has fewer pixels are set aside"
    )
    max_aspect: float | None = Field(
        None, ge=1, exclude_if=unset, description="Set aside where the longer side is more than this times the shorter"
    )
    bucket_aspect: float | None = Field(
        None,
        gt=1,
        le=8,
        exclude_if=unset,
        description="Keep the shape of pictures, to buckets of up to this aspect; unset: all become squares",
    )
    bucket_step: int = Field(
        8, ge=1, exclude_if=usual(8), description="Pixels of which both sides of a bucket are multiples"
    )
    near_duplicates: int | None = Field(
        None, ge=0, le=16, exclude_if=unset, description="Bits of 64 in which a near duplicate's hash differs at most"
    )
    encoding: Literal["png", "jpeg"] = Field(
        "png", exclude_if=usual("png"), description="Of the pictures in the shards; jpeg: not exact, for 256 pixels up"
    )
    jpeg_quality: int = Field(95, ge=1, le=100, exclude_if=usual(95), description="jpeg: 100 is the largest and best")
    columns: Columns = Columns()

    @model_validator(mode="after")
    def _checks(self) -> "ShardRecipe":
        if self.bucket_aspect is not None and self.resolution % self.bucket_step:
            raise ValueError(
                f"bucket_step={self.bucket_step} must divide resolution={self.resolution}: the square is one of the buckets"
            )
        return self


class UNetRecipe(Frozen):
    """The network F.  Names as in the U-Net's constructor."""

    channels: int = Field(48, ge=16, multiple_of=16, description="Channels at the first level")
    multipliers: tuple[int, ...] = Field((1, 2, 4), min_length=1, max_length=6, description="Channels of each level")
    blocks: tuple[int, ...] = Field((1, 1, 1), description="Residual blocks of each level, on the way down and up")
    attention: tuple[int, ...] = Field((8,), description="Sides of the feature maps that have self-attention")
    stem: Literal[1, 2, 4] = Field(2, description="Space-to-depth factor before the first convolution")
    dropout: Share = 0.0
    text_width: int = Field(0, ge=0, description="Numbers in a token embedding (minilm: 384); 0: no text")

    @property
    def divisor(self) -> int:
        """What both sides of a picture must be multiples of: stem x 2^(levels - 1)."""
        return self.stem * 2 ** (len(self.multipliers) - 1)

    @model_validator(mode="after")
    def _checks(self) -> "UNetRecipe":
        if len(self.blocks) != len(self.multipliers):
            raise ValueError(f"blocks={self.blocks} and multipliers={self.multipliers}: give one of each per level")
        if not all(1 <= n <= 16 for n in self.blocks) or not all(1 <= n <= 16 for n in self.multipliers):
            raise ValueError(f"blocks={self.blocks} and multipliers={self.multipliers}: each is from 1 to 16")
        if self.text_width and not self.attention:
            raise ValueError(
                f"text_width={self.text_width} and attention=(): text is read where there is attention, so give the"
                f" sides of one or more feature maps in attention, or text_width=0"
            )
        return self


class SamplingRecipe(Frozen):
    """How a picture is drawn when a request does not say."""

    sampler: SamplerName = "dpmpp_2m"
    steps: int = Field(24, ge=2, le=1_000)
    guidance: Annotated[float, Field(ge=0, le=20)] = Field(2.5, description="1 = none; D = worse + g (D - worse)")
    guidance_kind: GuidanceKind = Field(
        "classifier_free",
        exclude_if=usual("classifier_free"),
        description="The worse answer is the null label's, or that of the model evaluate.guide_images  [Karras et al. 2024]",
    )
    guidance_interval: tuple[float, float] = Field((0.0, 1e6), description="sigma range in which guidance acts")
    guidance_rescale: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0, exclude_if=usual(0.0), description="Share in which contrast is as without guidance  [Lin et al. 2024: phi]"
    )
    spacing: Literal["karras", "exponential", "trailing", "leading", "linspace"] = Field(
        "karras", description="Of the noise levels; exponential: even in log-SNR; the last three: steps t of a chain"
    )
    sigma_min: Positive = Field(0.1, description="karras, exponential: the last level above 0")
    sigma_max: Positive = Field(80.0, description="karras, exponential: the first level")
    rho: Positive = Field(7.0, description="karras: larger puts more levels where noise is low  [EDM, Eq. 5]")
    chain: ChainName = Field("linear", description="trailing, leading, linspace: beta schedule")
    chain_steps: int = Field(1_000, ge=2, le=100_000, description="trailing, leading, linspace: its length T")

    @model_validator(mode="after")
    def _checks(self) -> "SamplingRecipe":
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min={self.sigma_min} must be below sigma_max={self.sigma_max}")
        if not 0 <= self.guidance_interval[0] <= self.guidance_interval[1]:
            raise ValueError(f"guidance_interval={self.guidance_interval}: lowest sigma first, and none below 0")
        return self


class Lesson(Frozen):
    """What makes a run a student's: from each noise level of its few to the next, it learns to go in one step where its
    teacher goes in several, guidance included."""

    teacher: str = Field(pattern=r"^[0-9a-f]{64}$", description="Digest of the teacher's bundle")
    by: SamplingRecipe = Field(description="How the teacher draws")
    student: SamplingRecipe = Field(description="How the student will draw: at these levels alone")

    @model_validator(mode="after")
    def _checks(self) -> "Lesson":
        if self.by.sampler not in DETERMINISTIC:
            raise ValueError(
                f"the teacher draws with {self.by.sampler}, which adds noise in every step, so that there is no one result"
                f" to learn: distil with evaluate.sampling.sampler one of {', '.join(DETERMINISTIC)}"
            )
        if self.by.guidance_kind != "classifier_free":
            raise ValueError(
                "the teacher is guided by a worse model, and only classifier-free guidance is distilled: set"
                " evaluate.sampling.guidance_kind=classifier_free"
            )
        if (self.student.sampler, self.student.guidance) != ("ddim", 1):
            raise ValueError(
                f"a student draws with sampler ddim and guidance 1, not {self.student.sampler} and"
                f" {self.student.guidance:g}: its answers lead in one such step to the next level, and its"
                " teacher's guidance is in them"
            )
        return self


class TrainRecipe(Frozen):
    """The training run.  Batch size is here because it changes the numbers; the number of workers is not."""

    unet: UNetRecipe = UNetRecipe()
    init: str | None = Field(
        None,
        pattern=r"^[0-9a-f]{64}$",
        exclude_if=unset,
        description="Digest of the model whose weights it starts from; none: from random ones. See `--init`",
    )
    images: int = Field(33_000, ge=1, description="Images to see in all; the run's only clock counts to here")
    batch_size: int = Field(32, ge=1, description="Images per optimizer step, over all workers")
    micro_batch: int | None = Field(
        None,
        ge=1,
        exclude_if=unset,
        description="Images in memory at once; the gradients of a batch's are then summed in one order, to the same bits on"
        " 1, 2, 4 ... workers; see docs/training.md",
    )
    label_drop: Share = Field(0.1, description="Share of labels replaced by the null label, for guidance")
    text_encoder: Literal["none", "minilm", "clip", "t5"] = Field("none", description="What reads the captions, if any")
    text_tokens: int = Field(64, ge=3, description="Tokens read of a caption at most")
    codec: Literal["none", "autoencoder-kl"] = Field(
        "none",
        exclude_if=usual("none"),
        description="What makes latents of the pictures, if anything; see docs/latents.md",
    )
    codec_channels: int = Field(
        3, ge=1, le=256, exclude_if=usual(3), description="Channels of its latents; 3 without a codec"
    )
    codec_factor: int = Field(
        1, ge=1, le=64, exclude_if=usual(1), description="Side of a picture over that of its latent; 1 without a codec"
    )
    degradations: tuple[TaskName, ...] = Field(
        (), exclude_if=unset, description="Restoration to learn, besides drawing"
    )
    sigma_data: Positive = Field(0.5, description="Standard deviation of a number of x0: a pixel's, or a latent's")
    prediction: PredictionName = Field("edm", description="What the network predicts; the textbook's is epsilon")
    weight: Literal["edm", "simple", "p2", "min_snr", "uncertainty"] = Field(
        "edm", description="Of the loss by noise level; simple: the textbook's error of epsilon; uncertainty: learned"
    )
    p2_gamma: Annotated[float, Field(ge=0)] = Field(1.0, description="p2: 0 is simple  [Choi et al. 2022: gamma]")
    min_snr_gamma: Positive = Field(5.0, description="min_snr: the clamp  [Hang et al. 2023: gamma]")
    noise: Literal["log_normal", "log_uniform", "uniform_t"] = Field("log_normal", description="Density of sigma")
    noise_mean: float = Field(-0.3, description="log_normal: mean of ln sigma  [EDM, Table 1: P_mean]")
    noise_std: Positive = Field(1.3, description="log_normal: standard deviation of ln sigma  [EDM: P_std]")
    noise_min: Positive = Field(0.002, description="log_uniform: lowest sigma")
    noise_max: Positive = Field(80.0, description="log_uniform: highest sigma")
    chain: ChainName = Field("linear", description="uniform_t: beta schedule")
    chain_steps: int = Field(1_000, ge=2, le=100_000, description="uniform_t: its length T")
    noise_stratified: bool = Field(False, description="One noise level from each of batch_size equally likely ranges")
    optimizer: Literal["muon", "adamw"] = Field("muon", description="muon: for convolutions, with AdamW for the rest")
    lr: Positive = Field(5e-3, description="Peak learning rate")
    warmup_images: int = Field(4_000, ge=0, description="Linear warm-up of the learning rate")
    decay: Literal["cosine", "inverse_sqrt", "none"] = "cosine"
    decay_images: int = Field(20_000, ge=1, description="inverse_sqrt: the rate falls as sqrt(decay_images / images)")
    beta2: Annotated[float, Field(gt=0, lt=1)] = Field(0.99, description="Of AdamW's second moment")
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip_norm: Positive = Field(1.0, description="Largest norm of the gradient")
    ema: tuple[float, ...] = Field((0.05, 0.1), min_length=1, description="Relative widths of the power EMAs  [EDM2]")
    precision: Literal["bf16", "fp32"] = Field("bf16", description="Type the network computes in")
    hflip: bool = Field(False, description="Mirror half of the pictures")
    checkpoint_images: int = Field(10_000, ge=1, description="A checkpoint every so many images")
    streams: int = Field(8, ge=1, description="Canonical streams of the sample order")
    window: int = Field(1_024, ge=1, description="Samples are shuffled within windows of this size")
    seed: int = Field(0, ge=0, lt=2**32)
    lesson: Lesson | None = Field(None, exclude_if=unset, description="Of a student's run: `student_of` writes it")

    @model_validator(mode="after")
    def _checks(self) -> "TrainRecipe":
        if len(set(self.ema)) != len(self.ema) or not all(0 < s < 0.28 for s in self.ema):
            # sqrt(1/12) = 0.2887 is the width of the flat average: nothing is wider  [EDM2, Sec. 3.1]
            raise ValueError(f"ema={self.ema}: relative widths are distinct and lie between 0 and 0.28")
        if (self.text_encoder == "none") != (self.unet.text_width == 0):
            raise ValueError(
                f"text_encoder={self.text_encoder} and unet.text_width={self.unet.text_width}: an encoder and the width of"
                f" its tokens (minilm: 384) go together, so give both, or none and 0"
            )
        if self.micro_batch and self.batch_size % self.micro_batch:
            raise ValueError(
                f"micro_batch={self.micro_batch} does not divide batch_size={self.batch_size}: choose a divisor; where the"
                f" quotient is a power of two, so many workers can train, or any lower power of two"
            )
        shape = (self.codec_channels, self.codec_factor)
        if self.codec == "none" and shape != (3, 1):
            raise ValueError(
                f"codec=none, codec_channels={shape[0]} and codec_factor={shape[1]}: without a codec the network sees the"
                f" picture, 3 and 1; name the codec as well, as in codec=autoencoder-kl"
            )
        if self.codec != "none" and self.codec_factor == 1:
            raise ValueError(
                f"codec={self.codec} and codec_factor=1: say what shape its latents have, as in codec_channels=4 and"
                f" codec_factor=8 (latent_channels of its config.json, and 2 to the number of its blocks less 1)"
            )
        if self.codec != "none" and self.hflip:
            raise ValueError(
                f"hflip=true and codec={self.codec}: the latents of a mirrored picture are not its latents mirrored; mirror"
                f" the pictures of the source instead"
            )
        if self.codec != "none" and self.degradations:
            raise ValueError(
                f"degradations={self.degradations} and codec={self.codec}: restoration measures pixels, and this network"
                f" sees latents; give codec=none, or no degradations"
            )
        if len(set(self.degradations)) != len(self.degradations):
            raise ValueError(f"degradations={self.degradations}: name each task once, they come equally often")
        if self.noise_min >= self.noise_max:
            raise ValueError(f"noise_min={self.noise_min} must be below noise_max={self.noise_max}")
        if self.lesson and self.degradations:
            raise ValueError(
                f"degradations={self.degradations}: a network that restores is not distilled, its steps lead to a picture"
                f" that agrees with a measurement; set distill.steps=0"
            )
        return self


def checkpoints_of(recipe: TrainRecipe) -> tuple[int, ...]:
    """images_seen at each checkpoint of a run, ascending: the first whole batch at or beyond each multiple of
    checkpoint_images, and the end."""
    batch, every = recipe.batch_size, recipe.checkpoint_images
    end = math.ceil(recipe.images / batch) * batch
    return tuple(sorted({math.ceil(images / batch) * batch for images in range(every, end + 1, every)} | {end}))


class EvaluateRecipe(Frozen):
    """What is measured, and on how many samples."""

    samples: int = Field(512, ge=16, le=100_000, description="Pictures drawn; labels follow the data's frequencies")
    batch_size: int = Field(32, ge=1, le=1_024, description="Pictures drawn together (fixed: part of the identity)")
    sampling: SamplingRecipe = SamplingRecipe()
    ema: float = Field(
        0.1,
        gt=0,
        lt=0.28,
        description="Relative width of the average to evaluate, register and serve; one that train.ema lacks is put"
        " together from the run's checkpoints",
    )
    guide_images: int | None = Field(
        None, ge=1, exclude_if=unset, description="Autoguidance's worse model: the same run at this checkpoint"
    )
    guide_ema: float | None = Field(
        None,
        gt=0,
        lt=0.28,
        exclude_if=unset,
        description="Relative width of the worse model's average; none: that of ema",
    )
    extractor: Literal["efficientnet-lite0", "inception-v3", "dinov2"] = "efficientnet-lite0"
    extractor_resolution: int = Field(96, ge=32, le=518, description="Side to which pictures are resized for it")
    loss_levels: tuple[float, ...] = Field(
        (0.1, 0.3, 1.0, 3.0, 10.0), min_length=1, description="sigma of the held-out losses"
    )
    loss_pictures: int = Field(64, ge=1, description="Held-out pictures in those losses and in the bound")
    bound_steps: int = Field(1_000, ge=0, le=100_000, description="T of the variational bound's chain; 0: no bound")
    bound_draws: int = Field(8, ge=1, le=1_000, description="Of its T - 1 steps, drawn for each picture")
    bound_sigma_min: Positive = Field(0.02, description="Its first noise level: the lowest that training knows well")
    bound_sigma_max: Positive = Field(80.0, description="Its last noise level")
    grid_columns: int = Field(12, ge=1, le=32, description="Samples per class in the grid")
    seed: int = Field(0, ge=0, lt=2**32)

    @model_validator(mode="after")
    def _checks(self) -> "EvaluateRecipe":
        if min(self.loss_levels) <= 0:
            raise ValueError(f"loss_levels={self.loss_levels}: noise levels are above 0")
        if self.bound_steps == 1:
            raise ValueError("bound_steps=1: a chain has at least 2 steps; 0 measures no bound")
        if self.bound_sigma_min >= self.bound_sigma_max:
            raise ValueError(
                f"bound_sigma_min={self.bound_sigma_min} must be below bound_sigma_max={self.bound_sigma_max}"
            )
        if self.guide_images is None and self.sampling.guidance_kind == "autoguidance":
            raise ValueError(
                "sampling.guidance_kind=autoguidance needs a worse model to lead away from: give the images of an early"
                " checkpoint of the run as evaluate.guide_images"
            )
        if self.guide_images is None and self.guide_ema is not None:
            raise ValueError(
                f"guide_ema={self.guide_ema} is the average of a worse model: give evaluate.guide_images as well"
            )
        return self


class DistillRecipe(Frozen):
    """The few-step student of the trained model.  It starts from its teacher's average and asks it in every step."""

    steps: int = Field(0, ge=0, le=64, description="Steps, and evaluations, of a picture by the student; 0: no student")
    images: int = Field(3_200, ge=1, description="Images to see in all")
    lr: Positive = Field(1e-3, description="Peak learning rate")
    warmup_images: int = Field(320, ge=0, description="Linear warm-up of the learning rate")
    teacher_steps: int = Field(16, ge=2, le=1_000, description="Of the teacher over the whole way, between the levels")
    sigma_min: Positive = Field(0.5, description="The student's last level above 0; even in log-SNR from the highest")

    @model_validator(mode="after")
    def _checks(self) -> "DistillRecipe":
        if self.steps == 1:
            raise ValueError("steps=1: a student has at least 2 steps; 0 makes none")
        return self


class GateRecipe(Frozen):
    """What a model must show before the alias `champion` moves."""

    confidence: Annotated[float, Field(ge=0.5, lt=1)] = Field(0.9, description="Of the interval that decides")
    max_loss: Positive = Field(1.0, description="Held-out loss at every level; 1 is a network that always answers 0")
    max_frechet: Positive | None = Field(None, description="Upper limit of the Frechet distance, if any")
    max_student_excess: Annotated[float, Field(ge=0)] = Field(
        0.15,
        exclude_if=usual(0.15),
        description="A student takes the place of its teacher where its Frechet distance is higher by this share at most",
    )


class ServeRecipe(Frozen):
    """Limits of the endpoint."""

    slots: int = Field(16, ge=1, le=1_024, description="Pictures drawn at once; more wait in the queue")
    queue: int = Field(256, ge=1, description="Pictures waiting at most; then 503 with Retry-After")
    max_n: int = Field(16, ge=1, le=256, description="Pictures per request")
    max_steps: int = Field(100, ge=2, le=1_000)
    timeout_s: Positive = Field(120.0, description="A request older than this is given up")


class Recipe(Frozen):
    """A whole line: shard -> train -> evaluate -> distill, where there is to be a student -> register -> deploy."""

    name: str = Field("demo", pattern=r"^[a-z0-9][a-z0-9-]{0,62}$", description="Name of the registered model")
    shard: ShardRecipe = ShardRecipe()
    train: TrainRecipe = TrainRecipe()
    evaluate: EvaluateRecipe = EvaluateRecipe()
    distill: DistillRecipe = Field(DistillRecipe(), exclude_if=usual(DistillRecipe()))
    gate: GateRecipe = GateRecipe()
    serve: ServeRecipe = ServeRecipe()

    @model_validator(mode="after")
    def _checks(self) -> "Recipe":
        evaluate, moments = self.evaluate, checkpoints_of(self.train)
        if evaluate.guide_images not in (None, *moments):
            raise ValueError(
                f"evaluate.guide_images={evaluate.guide_images}: the run has checkpoints at"
                f" {', '.join(map(str, moments))} images; give one of these"
            )
        if (evaluate.guide_images, evaluate.guide_ema or evaluate.ema) == (moments[-1], evaluate.ema):
            raise ValueError(
                f"evaluate.guide_images={evaluate.guide_images}: the worse model is the model itself; give an earlier"
                f" checkpoint, or another evaluate.guide_ema"
            )
        unet, resolution = self.train.unet, self.shard.resolution
        factor = self.train.codec_factor
        divisor = unet.divisor * factor
        if resolution % divisor:
            of = "stem x 2^(levels - 1)" if factor == 1 else "stem x 2^(levels - 1) x codec_factor"
            raise ValueError(f"shard.resolution={resolution} must be divisible by {of} = {divisor}")
        if self.shard.bucket_aspect is not None:
            self._check_buckets(divisor)
        sides = [resolution // factor // unet.stem // 2**i for i in range(len(unet.multipliers))]
        if not set(unet.attention) <= set(sides):
            near = min(sides, key=lambda side: abs(side - max(unet.attention)))
            raise ValueError(
                f"train.unet.attention={unet.attention}: with shard.resolution={resolution} the network's feature maps have"
                f" the sides {sides}: choose of these, as in `--set train.unet.attention=[{near}]`"
            )
        return self

    def _check_buckets(self, divisor: int) -> None:
        """divisor: of both sides of a picture."""
        aspect, step, train = self.shard.bucket_aspect, self.shard.bucket_step, self.train
        if step % divisor:
            raise ValueError(
                f"shard.bucket_step={step} must be a multiple of stem x 2^(levels - 1) = {divisor}, by which the network"
                " divides both sides of a picture"
            )
        if train.degradations:
            raise ValueError(
                f"train.degradations={train.degradations} and shard.bucket_aspect={aspect:g}: its masks are made for"
                " squares, so learn restoration without buckets"
            )
        if train.codec != "none":
            raise ValueError(
                f"train.codec={train.codec} and shard.bucket_aspect={aspect:g}: latents are made of square pictures"
                " alone, so leave one of the two out"
            )


def student_of(recipe: Recipe, teacher: str) -> Recipe:
    """The line whose training makes the student of a model of `recipe`.  teacher: digest of that model's bundle.

    Raises ValueError where recipe.distill asks for none, or it cannot be made.
    """
    distill, sampling = recipe.distill, recipe.evaluate.sampling
    if distill.steps == 0:
        raise ValueError("distill.steps=0: say how few steps the student takes, as in `--set distill.steps=4`")
    student = SamplingRecipe(
        sampler="ddim",
        steps=distill.steps,
        guidance=1,
        spacing="exponential",
        sigma_min=distill.sigma_min,
        sigma_max=sampling.sigma_max,
    )
    by = sampling.model_copy(update={"steps": distill.teacher_steps})
    taught = {name: getattr(distill, name) for name in ("images", "lr", "warmup_images")}
    taught["checkpoint_images"] = min(recipe.train.checkpoint_images, -(-distill.images // 4))
    try:
        lesson = Lesson(teacher=teacher, by=by, student=student)
        train = TrainRecipe.model_validate({**recipe.train.model_dump(), **taught, "lesson": lesson, "init": None})
    except ValidationError as error:
        raise ValueError(f"no student can be made: {first_mistake(error)}") from None
    measured = {"sampling": student, "guide_images": None, "guide_ema": None}
    return recipe.model_copy(
        update={
            "train": train,
            "evaluate": recipe.evaluate.model_copy(update=measured),
            "distill": DistillRecipe(),
        }
    )
