"""What follows training - measuring, a student, the gate, the endpoint - and the whole line."""

from typing import Annotated, Literal

from pydantic import Field, ValidationError, model_validator

from diffusion.recipe.sampling import SamplingRecipe
from diffusion.recipe.shard import ShardRecipe
from diffusion.recipe.sweep import SweepRecipe, check_sweep
from diffusion.recipe.train import Lesson, TrainRecipe, checkpoints_of
from diffusion.recipe.values import Frozen, Positive, first_mistake, unset, usual


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
    images: int | None = Field(
        None,
        ge=1,
        exclude_if=unset,
        description="Checkpoint to evaluate, register and serve, by the images it has seen; none: the run's last",
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
    extractor: Literal["efficientnet-lite0", "inception-v3", "inception-v3-tf", "dinov2", "clip"] = "efficientnet-lite0"
    extractor_resolution: int = Field(96, ge=32, le=518, description="Side to which pictures are resized for it")
    loss_levels: tuple[float, ...] = Field(
        (0.1, 0.3, 1.0, 3.0, 10.0), min_length=1, description="sigma of the held-out losses"
    )
    loss_pictures: int = Field(64, ge=1, description="Held-out pictures in those losses and in the bound")
    bound_steps: int = Field(1_000, ge=0, le=100_000, description="T of the variational bound's chain; 0: no bound")
    bound_draws: int = Field(8, ge=1, le=1_000, description="Of its T - 1 steps, drawn for each picture")
    bound_sigma_min: Positive = Field(0.02, description="Its first noise level: the lowest that training knows well")
    bound_sigma_max: Positive = Field(80.0, description="Its last noise level")
    restoration_pictures: int = Field(
        16, ge=0, le=10_000, description="Held-out pictures restored in each task of restoration; 0: none"
    )
    chosen_by: str | None = Field(
        None,
        pattern=r"^[0-9a-f]{64}$",
        exclude_if=unset,
        description="Digest of the sweep that chose ema and sampling, if one did",
    )
    grid_columns: int = Field(12, ge=1, le=32, description="Samples per class in the grid")
    joint: Literal["none", "clip"] = Field(
        "none",
        exclude_if=usual("none"),
        description="What holds drawn pictures against their captions; clip: the folder that DIFFUSION_JOINT_CLIP names",
    )
    nearest_pairs: int = Field(
        8, ge=0, le=64, description="Drawn pictures shown beside the training pictures they are nearest to"
    )
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
    max_excess: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0,
        exclude_if=usual(0.0),
        description="Share of the champion's Frechet distance by which a model's may be higher; 0: it must be lower",
    )
    max_loss: Positive = Field(1.0, description="Held-out loss at every level; 1 is a network that always answers 0")
    max_frechet: Positive | None = Field(None, description="Upper limit of the Frechet distance, if any")
    max_student_excess: Annotated[float, Field(ge=0)] = Field(
        0.15,
        exclude_if=usual(0.15),
        description="A student takes the place of its teacher where its Frechet distance is higher by this share at most",
    )
    max_coverage_loss: Annotated[float, Field(ge=0, le=1)] = Field(
        0.1,
        exclude_if=usual(0.1),
        description="Share of the champion's coverage, and of its recall, that a model may lack",
    )
    min_coverage: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, exclude_if=unset, description="Lower limit of coverage, as a share of what real pictures score, if any"
    )
    max_memorized: Annotated[float, Field(ge=0, le=1)] = Field(
        0.02,
        exclude_if=usual(0.02),
        description="Share of copies of training pictures; refused where there are beyond doubt more",
    )
    max_restoration_loss: Annotated[float, Field(ge=0)] = Field(
        1.0,
        exclude_if=usual(1.0),
        description="dB of PSNR; refused where a task of restoration is beyond doubt worse than the champion's by more",
    )
    min_restoration_gain: float | None = Field(
        None,
        exclude_if=unset,
        description="dB of PSNR that each task of restoration gains at least over doing without a model, if any",
    )
    max_latency_s: Positive | None = Field(
        None, exclude_if=unset, description="Seconds for a picture with all serve.slots taken, 95 of 100 times, if any"
    )


class ServeRecipe(Frozen):
    """Limits of the endpoint."""

    slots: Annotated[int, Field(ge=1, le=1_024)] | Literal["auto"] = Field(
        "auto", description="Pictures drawn at once; auto: as many as the measured throughput gains by"
    )
    queue: int = Field(256, ge=1, description="Pictures waiting at most; then 503 with Retry-After")
    max_n: int = Field(16, ge=1, le=256, description="Pictures per request")
    max_steps: int = Field(100, ge=2, le=1_000)
    timeout_s: Positive = Field(120.0, description="A request older than this is given up")
    max_wait_s: Positive = Field(
        20.0, description="Who would wait longer for a slot is refused: 503 with Retry-After; less where a queue stands"
    )


class Recipe(Frozen):
    """A whole line: shard -> train -> sweep, where there is anything to try -> evaluate -> distill, where there is to be a
    student -> register -> deploy."""

    name: str = Field("demo", pattern=r"^[a-z0-9][a-z0-9-]{0,62}$", description="Name of the registered model")
    data_licence: str | None = Field(
        None, max_length=300, exclude_if=unset, description="Of the pictures, for the model card, as CC-BY 4.0"
    )
    shard: ShardRecipe = ShardRecipe()
    train: TrainRecipe = TrainRecipe()
    sweep: SweepRecipe = Field(SweepRecipe(), exclude_if=usual(SweepRecipe()))
    evaluate: EvaluateRecipe = EvaluateRecipe()
    distill: DistillRecipe = Field(DistillRecipe(), exclude_if=usual(DistillRecipe()))
    gate: GateRecipe = GateRecipe()
    serve: ServeRecipe = ServeRecipe()

    @model_validator(mode="after")
    def _checks(self) -> "Recipe":
        evaluate, moments = self.evaluate, checkpoints_of(self.train)
        check_sweep(self.sweep, evaluate)
        for name in ("images", "guide_images"):
            if getattr(evaluate, name) not in (None, *moments):
                raise ValueError(
                    f"evaluate.{name}={getattr(evaluate, name)}: the run has checkpoints at"
                    f" {', '.join(map(str, moments))} images; give one of these"
                )
        end = evaluate.images or moments[-1]
        if evaluate.guide_images and evaluate.guide_images > end:
            raise ValueError(
                f"evaluate.guide_images={evaluate.guide_images} and evaluate.images={end}: the worse model is not a later"
                f" one; give an earlier checkpoint"
            )
        if (evaluate.guide_images, evaluate.guide_ema or evaluate.ema) == (end, evaluate.ema):
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
        sides = unet.sides(resolution // factor)
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
    measured = {"sampling": student, "chosen_by": None, "images": None, "guide_images": None, "guide_ema": None}
    return recipe.model_copy(
        update={
            "train": train,
            "evaluate": recipe.evaluate.model_copy(update=measured),
            "sweep": SweepRecipe(),
            "distill": DistillRecipe(),
        }
    )
