"""degradation.py: what a network is shown is the measurement, whole, and a function of the position alone."""

import math

import numpy as np
import pytest
import torch

from diffusion.data.stream import Batch
from diffusion.degradation import FACTORS, UNMEASURED, beside, degraded, image_channels, masks_of, operators_of
from diffusion.operators import LUMA, BlockMean, Blur, Composition, Grey, LinearOperator, Mask, gaussian_kernel
from diffusion.random import Stream, bits
from diffusion.recipe import TrainRecipe, UNetRecipe
from diffusion.training.step import build_state, train_step

pytestmark = pytest.mark.usefixtures("one_thread")

TASKS = ("super-resolution", "inpainting", "colorization")
OPERATORS = {
    "mask": Mask(torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0)) < 0.5),
    "block mean": BlockMean(4),
    "grey": Grey(),
    "small grey": Composition(BlockMean(2), Grey()),
    "blur": Blur(gaussian_kernel(1.0), 8, 8),
}


def pictures(n: int, side: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense(operator: LinearOperator, side: int) -> torch.Tensor:
    """A as a matrix, column by column."""
    basis = torch.eye(3 * side * side, dtype=torch.float64).view(-1, 3, side, side)
    return operator.forward(basis).flatten(1).T


@pytest.mark.parametrize("name", list(OPERATORS))
def test_beside_x_stand_the_shortest_picture_that_measures_so_and_the_root_of_the_gram_matrix(name: str) -> None:
    operator, x = OPERATORS[name], pictures(2, 8)
    shown, weight = beside(operator, x).chunk(2, dim=1)
    y = operator.forward(x)
    torch.testing.assert_close(operator.forward(shown), y)
    torch.testing.assert_close(shown, operator.pinv(y))
    matrix = dense(operator, 8)
    values, vectors = torch.linalg.eigh(matrix.T @ matrix)
    root = vectors @ (values.clamp(min=0).sqrt()[:, None] * vectors.T)
    torch.testing.assert_close(weight, root.sum(dim=1).view(1, 3, 8, 8).expand(2, -1, -1, -1))
    torch.testing.assert_close(beside(operator, operator.pinv(y)), beside(operator, x))  # all that restoring knows


def test_tasks_and_factors_are_told_apart_wherever_one_looks() -> None:
    """By the weights at any one pixel; a mask's are 1 and 0."""
    told = [BlockMean(factor) for factor in FACTORS] + [Grey()]
    weights = [tuple(beside(operator, pictures(1))[0, 3:, 5, 7].tolist()) for operator in told]
    everywhere = [(1.0, 1.0, 1.0), (0.0, 0.0, 0.0)]
    apart = torch.cdist(torch.tensor(weights + everywhere), torch.tensor(weights + everywhere))
    assert apart.fill_diagonal_(1).min() > 0.1


def test_a_picture_is_shown_what_its_position_says() -> None:
    x0, index = pictures(40), torch.arange(1_000, 1_040)

    def shown(rows: list[int] | slice = slice(None), *, shift: int = 0, seed: int = 3) -> torch.Tensor:
        return degraded(x0[rows], operators_of(index[rows] + shift, 16, seed=seed, tasks=TASKS))

    whole, rows = shown(), [7, 31, 2, 18]
    assert whole.shape == (40, image_channels(TASKS), 16, 16)
    assert torch.equal(shown(rows), whole[rows])
    assert not torch.equal(shown(seed=4), whole)
    assert not torch.equal(shown(shift=40), whole)
    kinds = [[type(a) for a in operators_of(index, 16, seed=seed, tasks=TASKS)] for seed in (3, 4)]
    assert kinds[0] != kinds[1]


def test_each_picture_of_a_batch_has_its_own_measurement() -> None:
    operators, x0 = operators_of(torch.arange(30), 16, seed=0, tasks=TASKS), pictures(30)
    whole = degraded(x0, operators)
    assert None in operators
    for i, operator in enumerate(operators):
        alone = beside(operator, x0[i : i + 1])[0] if operator else torch.zeros(6, 16, 16).double()
        torch.testing.assert_close(whole[i], alone)


def test_tasks_and_factors_come_equally_often_and_a_share_comes_without() -> None:
    n = 6_000
    drawn = operators_of(torch.arange(n), 16, seed=0, tasks=TASKS)
    names = [f"x{a.factor}" if isinstance(a, BlockMean) else type(a).__name__ for a in drawn]
    task = (1 - UNMEASURED) / 3
    shares = {"NoneType": UNMEASURED, "Mask": task, "Grey": task} | {f"x{factor}": task / 3 for factor in FACTORS}
    assert set(names) == set(shares)
    for name, share in shares.items():
        assert names.count(name) / n == pytest.approx(share, abs=5 * math.sqrt(share * (1 - share) / n))
    one = operators_of(torch.arange(200), 8, seed=0, tasks=("colorization",))
    assert {type(a) for a in one} == {type(None), Grey}
    assert image_channels(()) == 0


def lines(known: torch.Tensor) -> int:
    """How often a row of a mask differs from the one above it, the whole having an edge of nothing."""
    return int((known[1:] != known[:-1]).any(dim=1).sum())


def test_masks_are_of_all_sizes_and_half_of_them_of_rectangles() -> None:
    n = 1_000
    known = masks_of(torch.arange(n), 64, seed=0)
    share = known.float().mean(dim=(1, 2))
    assert share.min() < 0.1
    assert share.max() > 0.9
    assert 0.4 < known.float().mean(dim=0).min() <= known.float().mean(dim=0).max() < 0.7  # no place is always known
    few = sum(lines(mask) <= 4 and lines(mask.T) <= 4 for mask in known) / n  # two rectangles have four edges each way
    assert few == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("side", [64, 32, 16])
def test_free_forms_are_exactly_those_of_a_slow_version(side: int) -> None:
    """Bilinear interpolation of the grid's 8-bit numbers in float64, pixel by pixel."""
    index = torch.arange(40)
    words = bits(0, Stream.DEGRADATION, index, 16 + 32 * 32).numpy()
    known, compared = masks_of(index, side, seed=0).numpy(), 0
    for mask, word in zip(known, words, strict=True):
        *_, grid, level, kind = (word[:16] / 2**32).tolist()
        if kind < 0.5:
            continue
        n = (4, 8, 16, 32)[int(grid * 4)]
        values = (word[16:] & 255).reshape(32, 32)[:n, :n].astype(float)
        place = np.clip((np.arange(side) + 0.5) * n / side - 0.5, 0, None)
        low = place.astype(int)
        high, part = np.minimum(low + 1, n - 1), place - low
        rows = values[low] * (1 - part)[:, None] + values[high] * part[:, None]
        smooth = rows[:, low] * (1 - part) + rows[:, high] * part
        assert np.array_equal(mask, smooth > 255 * (0.25 + 0.5 * level))
        compared += 1
    assert compared > 10


# --- in training ---

RECIPE = TrainRecipe(
    unet=UNetRecipe(channels=16, multipliers=(1, 2), blocks=(1, 1), attention=()),
    degradations=("inpainting", "colorization"),
    images=150 * 16,
    batch_size=16,
    warmup_images=0,
    precision="fp32",
    label_drop=0.0,
    noise_mean=3.5,  # so much noise that little but what stands beside it tells a plain picture's colour
    noise_std=0.3,
    lr=0.01,
)
HUE = 0.8 * torch.tensor([LUMA[1], -LUMA[0], 0.0])  # of no luma: the grey of both hues is the same
HUES = torch.stack([-HUE, HUE])


def plain(start: int) -> Batch:
    """Pictures of one colour each."""
    index = torch.arange(start, start + RECIPE.batch_size)
    colour = ((HUES[index % 2] + 1) * 127.5).round().to(torch.uint8)
    return Batch(
        images=colour[:, :, None, None].expand(-1, -1, 8, 8).contiguous(),
        label=torch.zeros(len(index), dtype=torch.long),
        captions=[""] * len(index),
        keys=[str(i) for i in index.tolist()],
        index=index,
    )


def test_a_network_learns_from_what_stands_beside_x_and_no_more_than_that_says() -> None:
    """A part of the picture tells its hue, its grey does not."""
    state = build_state(RECIPE, resolution=8, classes=1, device="cpu")
    while state.images_seen < RECIPE.images:
        train_step(state, plain(state.images_seen), RECIPE)
    part = torch.zeros(3, 8, 8, dtype=torch.bool)
    part[:, 2:6, 1:5] = True
    x0 = HUES[:, :, None, None].expand(-1, -1, 8, 8)
    noise = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    x = 30 * (noise - noise.mean(dim=(2, 3), keepdim=True)).expand(2, -1, -1, -1)

    def hue(image: torch.Tensor) -> list[float]:
        with torch.no_grad():
            answer = state.net.eval()(x, torch.full((2,), 30.0), image=image)
        return (answer.mean(dim=(2, 3)) @ HUE / (HUE @ HUE)).tolist()

    assert hue(beside(Mask(part), x0)) == pytest.approx([-1, 1], abs=0.4)
    assert hue(beside(Grey(), x0)) == pytest.approx([0, 0], abs=0.4)
