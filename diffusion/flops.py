"""What a network's answer costs, from its recipe alone: nothing is built, so a recipe can be priced before it is trained."""

from diffusion.degradation import image_channels
from diffusion.distill import asked
from diffusion.recipe import TrainRecipe, UNetRecipe

_FORWARD_AND_BACKWARD = 3  # times the forward pass, as all published shares count; computing blocks again is no gain


def unet_flops(
    recipe: UNetRecipe,
    *,
    resolution: int,
    batch: int = 1,
    tokens: int = 0,
    picture_channels: int = 3,
    image_channels: int = 0,
    size: tuple[int, int] | None = None,
) -> int:
    """Floating-point operations of one forward pass, a multiplication with its addition counted as 2.

    Convolutions, matrices and attention products; normalizations, activations and sums are left out, as in all published
    counts.  A backward pass costs twice as much again.  tokens: T of the text, which the null token joins.
    image_channels: of the picture beside x, as in `UNet`.  size: (height, width) of the picture, where it is no square of
    `resolution`, which says on what levels there is attention.
    """
    width, sizes = 4 * recipe.channels, [recipe.channels * m for m in recipe.multipliers]
    height, breadth = size or (resolution, resolution)
    keys = tokens + 1 if recipe.text_width else 0
    macs = recipe.channels * width + width * width  # the embedding of noise level and label
    for i, (features, blocks) in enumerate(zip(sizes, recipe.blocks, strict=True)):
        positions = (height // recipe.stem // 2**i) * (breadth // recipe.stem // 2**i)
        before = sizes[i - 1] if i else recipe.channels
        macs += sum(_block(a, features, positions, width) for a in [before] + [features] * (2 * blocks - 1))
        if resolution // recipe.stem // 2**i in recipe.attention:
            reading = _reading(features, positions, keys, recipe.text_width)
            macs += 2 * blocks * (_attention(features, positions) + reading)
        macs += positions * features * before if i else 0  # the merge
    folded = height * breadth * 9
    macs += folded * ((picture_channels + image_channels) * recipe.channels + sizes[0] * picture_channels)
    return 2 * batch * macs


def training_flops(
    recipe: TrainRecipe, *, side: int, batch: int = 1, tokens: int = 0, size: tuple[int, int] | None = None
) -> int:
    """Likewise of a training step on `batch` pictures, what a student asks its teacher for included.  side: of the squares
    that the network sees, pictures or latents."""
    passes = _FORWARD_AND_BACKWARD + (asked(recipe.lesson) if recipe.lesson else 0)
    return round(
        passes
        * unet_flops(
            recipe.unet,
            resolution=side,
            batch=batch,
            tokens=tokens,
            picture_channels=recipe.codec_channels,
            image_channels=image_channels(recipe.degradations),
            size=size,
        )
    )


def _block(inputs: int, outputs: int, positions: int, width: int) -> int:
    skip = inputs * outputs if inputs != outputs else 0
    return positions * (9 * outputs * (inputs + outputs) + skip) + 2 * width * outputs


def _attention(channels: int, positions: int) -> int:
    return positions * 4 * channels**2 + 2 * positions**2 * channels


def _reading(channels: int, positions: int, keys: int, text_width: int) -> int:
    if not keys:
        return 0
    return positions * 2 * channels**2 + keys * text_width * 2 * channels + 2 * positions * keys * channels
