"""The network and its training."""

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from diffusion.recipe.sampling import DETERMINISTIC, ChainName, SamplingRecipe
from diffusion.recipe.values import Frozen, Positive, Share, unset, usual

PredictionName = Literal["edm", "epsilon", "v", "x0"]
TaskName = Literal["super-resolution", "inpainting", "colorization"]


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
        if self.lesson and self.init:
            raise ValueError(
                f"init={self.init[:12]}: a student starts from the weights of its teacher, {self.lesson.teacher[:12]}, and"
                f" from no other model's; leave init out"
            )
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
