"""One training step: state and batch in, numbers out, no I/O.

Everything random about a picture - noise level, noise, dropped label, mirroring, what is left of it to see - is a function
of (seed, its position in the global order), so it does not depend on how the batch is divided or on where a run was
interrupted.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from diffusion.codec import CodecIdentity
from diffusion.degradation import degraded, image_channels, operators_of
from diffusion.denoiser import Denoiser, denoiser_of
from diffusion.distill import taught
from diffusion.ema import PowerEMA
from diffusion.loss import Uncertainty, denoising_loss, uncertain, weight_of, weighted_error
from diffusion.recipe import TrainRecipe, checkpoints_of
from diffusion.store.codecs import identity_for
from diffusion.store.refs import DatasetRef
from diffusion.store.text_encoders import encoder_of
from diffusion.text import TextEncoder, TextIdentity
from diffusion.training.corrupt import Batch, caption_condition, corrupt
from diffusion.training.device import sent
from diffusion.training.exact import AddUp, tree_sum
from diffusion.training.optimizer import Optimizers, optimizer_of
from diffusion.training.shards import Shards


@dataclass
class TrainState:
    """The only mutable object of a run."""

    net: Denoiser
    ema: PowerEMA
    optimizer: Optimizers
    images_seen: int = 0
    encoder: TextEncoder | None = None  # of train.text_encoder; frozen, so of a checkpoint its identity alone
    uncertainty: Uncertainty | None = None  # of train.weight=uncertainty; never averaged, never served
    codec: CodecIdentity | None = None  # of train.codec: what made the latents that it learns to draw
    teacher: Denoiser | None = None  # of train.lesson; frozen, so of a checkpoint its digest alone
    shards: Shards | None = None  # where the weights are divided over the processes: what all but the network is of

    @property
    def text(self) -> TextIdentity | None:
        """What reads the captions, if anything does."""
        return self.encoder.identity if self.encoder else None

    def parameters(self) -> dict[str, nn.Parameter]:
        """Every parameter that the optimizer moves, by name; where they are divided, this process's rows."""
        if self.shards:
            return self.shards.own
        extra = self.uncertainty.named_parameters("uncertainty") if self.uncertainty else ()
        return {**dict(self.net.named_parameters()), **dict(extra)}


class StepResult(NamedTuple):
    """What was computed stays on the device: reading it waits for that."""

    losses: Tensor  # (b,) weighted loss of each picture, by the fixed weight alone, detached
    sigma: Tensor  # (b,), on the CPU
    level: Tensor  # (b,) int64 in [0, LEVELS), on the CPU
    grad_norm: Tensor  # () of the global batch, before clipping
    lr: float


class Part(NamedTuple):
    """Some pictures of a batch, which is one itself."""

    images: Tensor
    label: Tensor
    captions: list[str]
    keys: list[str]
    index: Tensor
    latents: Tensor | None


class Learned(NamedTuple):
    """What a gradient was made of."""

    losses: Tensor  # (b,) as of StepResult
    sigma: Tensor
    level: Tensor


class NonFiniteLoss(FloatingPointError):
    """The loss or the gradient is not finite.  samples: (key, sigma, loss) of each picture under suspicion."""

    def __init__(self, images_seen: int, grad_norm: float, samples: tuple[tuple[str, float, float], ...]) -> None:
        self.images_seen, self.grad_norm, self.samples = images_seen, grad_norm, samples
        broken = [sample for sample in samples if not math.isfinite(sample[2])]
        shown = broken or sorted(samples, key=lambda sample: -sample[2])
        listed = ", ".join(f"{key!r} (sigma {sigma:.4g}, loss {loss:.4g})" for key, sigma, loss in shown[:8])
        more = f" and {len(shown) - 8} more" if len(shown) > 8 else ""
        what = f"{len(broken)} losses are not finite" if broken else "the losses are finite, the gradient is not"
        super().__init__(
            f"at images_seen={images_seen} {what} (gradient norm {grad_norm:g}): {listed}{more}. The weights were not"
            f" updated. Look at these pictures; if they are fine, lower train.lr or set train.precision=fp32, and train"
            f" again."
        )

    def __reduce__(self):
        return NonFiniteLoss, (self.images_seen, self.grad_norm, self.samples)


def end_of(recipe: TrainRecipe) -> int:
    """images_seen at the end of a run: recipe.images rounded up to whole batches."""
    return checkpoints_of(recipe)[-1]


def lr_at(recipe: TrainRecipe, images_seen: float) -> float:
    """The learning rate: a linear warm-up times the decay.  `cosine` reaches 0 at recipe.images; `inverse_sqrt` falls as
    sqrt(decay_images / images_seen) from decay_images on  [EDM2, Eq. 67].
    """
    warm = min(images_seen / recipe.warmup_images, 1.0) if recipe.warmup_images else 1.0
    if recipe.decay == "cosine":
        fall = (1 + math.cos(math.pi * min(images_seen / recipe.images, 1.0))) / 2
    elif recipe.decay == "inverse_sqrt":
        fall = math.sqrt(recipe.decay_images / max(images_seen, recipe.decay_images))
    else:
        fall = 1.0
    return recipe.lr * warm * fall


def check_sizes(recipe: TrainRecipe, dataset: DatasetRef) -> None:
    """Raises ValueError where the recipe cannot learn from pictures of the dataset's sizes."""
    for height, width in dataset.sizes:
        if height % recipe.unet.divisor or width % recipe.unet.divisor:
            raise ValueError(
                f"dataset {dataset.digest[:16]} has pictures of {width} x {height}, and this network divides both sides by"
                f" {recipe.unet.divisor}: shard with `--set shard.bucket_step={recipe.unet.divisor}`"
            )
    if dataset.sizes and recipe.degradations:
        raise ValueError(
            f"dataset {dataset.digest[:16]} is in aspect buckets, and train.degradations={recipe.degradations} are made for"
            " squares: shard without shard.bucket_aspect"
        )
    if dataset.sizes and recipe.codec != "none":
        raise ValueError(
            f"dataset {dataset.digest[:16]} is in aspect buckets, and latents (train.codec={recipe.codec}) are made of"
            " squares alone: shard without shard.bucket_aspect"
        )


def build_state(
    recipe: TrainRecipe,
    *,
    resolution: int,
    classes: int,
    device: torch.device | str,
    teacher: Denoiser | None = None,
) -> TrainState:
    """The state at images_seen = 0, a function of the recipe alone.  resolution: of the pictures.  teacher: the denoiser of
    the bundle recipe.lesson.teacher, from whose weights a student starts.
    """
    assert (teacher is None) == (recipe.lesson is None)
    codec = identity_for(recipe)
    net = net_of(recipe, side=codec.side(resolution) if codec else resolution, classes=classes).to(device)
    net.train()
    if teacher is not None:
        net.load_state_dict(teacher.state_dict())
    uncertainty = Uncertainty().to(device) if recipe.weight == "uncertainty" else None
    learned = nn.ModuleList([net, uncertainty]) if uncertainty else net
    return TrainState(
        net,
        PowerEMA(net, recipe.ema),
        optimizer_of(recipe, learned),
        encoder=encoder_of(recipe, str(device)),
        uncertainty=uncertainty,
        codec=codec,
        teacher=teacher,
    )


def net_of(recipe: TrainRecipe, *, side: int, classes: int) -> Denoiser:
    """The network of a recipe as its run begins.  side: of the squares that it sees, pictures or latents."""
    return denoiser_of(
        recipe.unet,
        resolution=side,
        classes=classes,
        sigma_data=recipe.sigma_data,
        precision=recipe.precision,
        prediction=recipe.prediction,
        channels=recipe.codec_channels,
        image_channels=image_channels(recipe.degradations),
        seed=recipe.seed,
    )


def null_condition(state: TrainState, batch: Batch, cond: dict[str, Tensor]) -> dict[str, Tensor]:
    """What guidance leads a teacher away from: neither a class nor a caption, for each row of `cond`."""
    null = {"label": torch.full_like(cond["label"], state.net.null_label)}
    if state.encoder:
        null |= caption_condition(batch.captions, torch.ones(len(batch.captions), dtype=torch.bool), state.encoder)
    return null


def train_step(
    state: TrainState, batch: Batch, recipe: TrainRecipe, *, model: nn.Module | None = None, add_up: AddUp | None = None
) -> StepResult:
    """One step on this process's share of the global batch: loss, gradient, clip, optimizer, averages, clock.

    model: state.net wrapped for data parallelism, which averages the gradients over equal shares; state.net if None.
    add_up: of the exact mode (recipe.micro_batch), instead of such a model; None if this is the only process.
    A loss that is not finite anywhere makes the gradient norm not finite everywhere.  The weights are not updated then:
    on the CPU NonFiniteLoss is raised at once; elsewhere reading the norm would stall the device, so the caller passes
    the result to `raise_if_not_finite` when it is at hand.
    """
    if recipe.micro_batch is None:
        learned = learn(state, batch, recipe, model or state.net)
    else:
        learned = learn_in_parts(state, batch, recipe, add_up)
    norm = clip_gradients(state, recipe.clip_norm)
    # the middle of the step: neither the first nor the last step has rate 0
    lr = lr_at(recipe, state.images_seen + recipe.batch_size / 2)
    result = StepResult(*learned, norm, lr)
    on_cpu = norm.device.type == "cpu"
    if on_cpu:
        raise_if_not_finite(result, batch, state.images_seen)
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    state.optimizer.step(skip=None if on_cpu else ~norm.isfinite())
    state.images_seen += recipe.batch_size
    state.ema.update(state.shards.weights if state.shards else state.net, state.images_seen, recipe.batch_size)
    return result


def learn(state: TrainState, batch: Batch, recipe: TrainRecipe, model: nn.Module) -> Learned:
    """Leave the gradient of the batch's mean loss in the parameters."""
    device = device_of(state)
    if recipe.unet.dropout:  # drawn by torch's own generator, which is not part of the state
        torch.manual_seed((recipe.seed << 32) ^ int(batch.index[0]))
    x0, noise, drawn_sigma, label, wordless, level = corrupt(batch, recipe, state.net.null_label, device)
    sigma, cond = sent(drawn_sigma, device), {"label": label}
    if state.encoder:
        cond |= caption_condition(batch.captions, wordless, state.encoder)
    if recipe.degradations:
        side, tasks = x0.shape[-1], recipe.degradations
        cond["image"] = degraded(x0, operators_of(batch.index, side, seed=recipe.seed, tasks=tasks, device=device))
    if recipe.lesson:
        null = null_condition(state, batch, cond)
        x = x0 + sigma.view(-1, 1, 1, 1) * noise
        target = taught(state.teacher, x, drawn_sigma, cond, null, recipe.lesson)
        losses = weighted_error(model, weight_of(recipe), x, target, sigma, cond)
    else:
        losses = denoising_loss(model, weight_of(recipe), x0, noise, sigma, cond)
    loss = (uncertain(losses, state.uncertainty(sigma)) if state.uncertainty else losses).mean()
    state.optimizer.zero_grad()
    # an infinite loss can have a finite gradient; this factor makes sure that all processes learn of it
    (loss * torch.where(loss.isfinite(), 1.0, math.nan)).backward()
    if state.shards:
        state.shards.take_gradients()
    return Learned(losses.detach(), drawn_sigma, level)


def learn_in_parts(state: TrainState, batch: Batch, recipe: TrainRecipe, add_up: AddUp | None) -> Learned:
    """Leave the gradient of the global batch's mean loss in the parameters, the same bits whatever this process's share.

    All that is computed of a micro-batch has its shapes and none of the share's, since results depend on shapes.
    """
    parameters = list(state.parameters().values())
    learned = []

    def gradients() -> Iterator[list[Tensor]]:
        for part in parts_of(batch, recipe.micro_batch):
            learned.append(learn(state, part, recipe, state.net))
            yield [parameter.grad for parameter in parameters]

    total = tree_sum(gradients())
    if add_up:
        add_up(total)
    torch._foreach_mul_(total, recipe.micro_batch / recipe.batch_size)
    for parameter, gradient in zip(parameters, total, strict=True):
        parameter.grad = gradient
    return Learned(*(torch.cat(parts) for parts in zip(*learned, strict=True)))


def clip_gradients(state: TrainState, most: float) -> Tensor:
    """Scale the gradient down to a norm of `most`, where it is longer.  Returns its norm before, ()."""
    if state.shards:
        return state.shards.clip_gradients(most)
    return torch.nn.utils.clip_grad_norm_(state.parameters().values(), most, foreach=True)


def parts_of(batch: Batch, size: int) -> Iterator[Part]:
    """A batch as parts of `size` pictures."""
    for start in range(0, len(batch.keys), size):
        rows = slice(start, start + size)
        latents = None if batch.latents is None else batch.latents[rows]
        yield Part(
            batch.images[rows], batch.label[rows], batch.captions[rows], batch.keys[rows], batch.index[rows], latents
        )


def device_of(state: TrainState) -> torch.device:
    """The device the state lives on."""
    return next(state.net.parameters()).device


def raise_if_not_finite(result: StepResult, batch: Batch, images_seen: int) -> None:
    """Raise NonFiniteLoss for a step whose gradient is not finite, naming this process's part in it.

    images_seen: before the step.
    """
    norm = float(result.grad_norm)
    if math.isfinite(norm):
        return
    samples = list(zip(batch.keys, result.sigma.tolist(), result.losses.tolist(), strict=True))
    broken = [sample for sample in samples if not math.isfinite(sample[2])]
    raise NonFiniteLoss(images_seen, norm, tuple(broken or samples))
