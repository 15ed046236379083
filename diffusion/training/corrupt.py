"""A batch as the loss sees it: what is random about each picture, drawn from its position.

Numbers of a picture are drawn on the CPU, where positions and captions are, and are sent; so nothing that depends on them
waits for the device.  Only what has the size of pictures is drawn on it.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from diffusion.codec import drawn
from diffusion.data.images import to_model
from diffusion.density import density_of, stratified
from diffusion.random import Stream, normal, uniform
from diffusion.recipe import TrainRecipe
from diffusion.text import TextEncoder
from diffusion.training.device import sent

LEVELS = 4  # noise levels are reported in the quartiles of their distribution, lowest first


class Batch(Protocol):
    """What a step needs of a batch; `data.stream.Batch` is one."""

    images: Tensor  # (b, 3, H, W) uint8
    label: Tensor  # (b,) int64
    captions: list[str]
    keys: list[str]
    index: Tensor  # (b,) int64: positions in the global order
    latents: Tensor | None  # (b, 2, C, h, w) float32, in place of the images where the recipe has a codec


class Corrupted(NamedTuple):
    """A batch as the loss sees it."""

    x0: Tensor  # (b, 3, H, W) in [-1, 1], or latents (b, C, h, w)
    noise: Tensor
    sigma: Tensor  # (b,), on the CPU
    label: Tensor  # (b,) int64, some of them the null label
    wordless: Tensor  # (b,) bool, on the CPU: shown without their caption
    level: Tensor  # (b,) int64 in [0, LEVELS), on the CPU


def corrupt(batch: Batch, recipe: TrainRecipe, null_label: int, device: torch.device) -> Corrupted:
    """Draw everything random about a batch from the positions of its pictures."""
    index = batch.index
    there = sent(index, device)
    if recipe.codec != "none":
        x0 = drawn(sent(batch.latents, device), seed=recipe.seed, index=there)
    else:
        x0 = to_model(sent(batch.images, device))
    if recipe.hflip:
        mirrored = sent(uniform(recipe.seed, Stream.AUGMENT, index) < 0.5, device)
        x0 = torch.where(mirrored.view(-1, 1, 1, 1), x0.flip(-1), x0)
    if recipe.noise_stratified:
        u = stratified(recipe.seed, index, recipe.batch_size)
    else:
        u = uniform(recipe.seed, Stream.SIGMA, index)
    dropped, wordless = dropped_of(recipe, index)
    return Corrupted(
        x0=x0,
        noise=normal(recipe.seed, Stream.NOISE, there, tuple(x0.shape[1:])),
        sigma=density_of(recipe)(u).to(x0.dtype),
        label=sent(torch.where(dropped, null_label, batch.label), device),
        wordless=wordless,
        level=(u * LEVELS).long().clamp_(max=LEVELS - 1),
    )


def dropped_of(recipe: TrainRecipe, index: Tensor) -> tuple[Tensor, Tensor]:
    """Which pictures are shown without their label, and which without their caption: (b,) bool each.

    A share label_drop has neither.  Where captions are read as many, drawn apart, lack the one, and as many the other: a
    request may give both, either or none.
    """
    both, label, caption = (uniform(recipe.seed, Stream.LABEL_DROP, index, (3,)) < recipe.label_drop).unbind(1)
    return (both if recipe.text_encoder == "none" else both | label), both | caption


def caption_condition(captions: list[str], wordless: Tensor, encoder: TextEncoder) -> dict[str, Tensor]:
    """The captions of a batch as a condition, the dropped ones as null text.  wordless (b,) bool, on the CPU."""
    shown = ["" if drop else caption for caption, drop in zip(captions, wordless.tolist(), strict=True)]
    return encoder(shown)._asdict()
