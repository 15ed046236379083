"""The four laws of Moore and Penrose for every operator, and each operator against a slow version of its own."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion.operators import LUMA, MEAN, BlockMean, Blur, Composition, Grey, LinearOperator, Mask, gaussian_kernel

SHAPE = (3, 8, 16)
IDENTITY = Mask(torch.ones(SHAPE, dtype=torch.bool))


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_mask(seed: int, shape: tuple[int, ...] = SHAPE) -> Mask:
    generator = torch.Generator().manual_seed(seed)
    return Mask(torch.rand(shape, generator=generator) < torch.rand(1, generator=generator))


def blurs(height: int = 8, width: int = 16) -> st.SearchStrategy[Blur]:
    return st.floats(0.3, 3).map(lambda std: Blur(gaussian_kernel(std), height, width, cutoff=0.05))


seeds = st.integers(0, 2**20)
factors = st.sampled_from([1, 2, 4, 8])
greys = st.sampled_from([LUMA, MEAN, (1.0, 0.0, 0.0), (0.5, -2.0, 1.0)]).map(Grey)
small_greys = st.builds(Composition, factors.map(BlockMean), greys)
operators = st.one_of(
    seeds.map(random_mask),
    factors.map(BlockMean),
    greys,
    blurs(),
    small_greys,
    st.builds(Composition, blurs(), greys),
    st.builds(Composition, blurs(4, 8), st.just(BlockMean(2))),
    st.builds(
        Composition, seeds.map(lambda seed: random_mask(seed, (1, 2, 4))), st.just(Composition(BlockMean(4), Grey()))
    ),
)


def projected(operator: LinearOperator, x: torch.Tensor) -> torch.Tensor:
    return operator.pinv(operator.forward(x))


def inner(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a * b).sum())


@settings(max_examples=60, deadline=None)
@given(operators, seeds)
def test_the_laws_of_moore_and_penrose(operator: LinearOperator, seed: int) -> None:
    x, z = random(seed, 2, *SHAPE), random(seed + 1, 2, *SHAPE)
    y = random(seed + 2, *operator.forward(x).shape)
    u = random(seed + 3, *y.shape)
    forward, pinv = operator.forward, operator.pinv
    torch.testing.assert_close(forward(projected(operator, x)), forward(x), rtol=0, atol=1e-9)  # A A+ A = A
    torch.testing.assert_close(pinv(forward(pinv(y))), pinv(y), rtol=0, atol=1e-9)  # A+ A A+ = A+
    assert inner(projected(operator, x), z) == pytest.approx(inner(x, projected(operator, z)), abs=1e-9)
    assert inner(forward(pinv(y)), u) == pytest.approx(inner(y, forward(pinv(u))), abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(operators, seeds, st.floats(-3, 3))
def test_linear_and_batched_alike(operator: LinearOperator, seed: int, a: float) -> None:
    x, z = random(seed, 2, *SHAPE), random(seed + 1, 2, *SHAPE)
    y = operator.forward(x)
    torch.testing.assert_close(operator.forward(a * x + z), a * y + operator.forward(z))
    torch.testing.assert_close(operator.pinv(a * y), a * operator.pinv(y))
    assert operator.pinv(y).shape == x.shape
    torch.testing.assert_close(operator.forward(x[1:]), y[1:])
    assert operator.forward(x.float()).dtype == operator.pinv(y.float()).dtype == torch.float32


@settings(max_examples=40, deadline=None)
@given(operators, seeds)
def test_spectral_acts_on_the_singular_values(operator: LinearOperator, seed: int) -> None:
    """x^T V S^2 V^T x = ||A x||^2, and V g(S) V^T is multiplicative in g with A+ A as its one."""
    x = random(seed, 2, *SHAPE)
    squared = operator.spectral(x, lambda s: s**2)
    assert inner(x, squared) == pytest.approx(operator.forward(x).square().sum().item(), abs=1e-9)
    torch.testing.assert_close(operator.spectral(x, torch.ones_like), projected(operator, x))
    torch.testing.assert_close(operator.spectral(x, lambda s: 0 * s + 3), 3 * projected(operator, x))
    torch.testing.assert_close(operator.spectral(squared, lambda s: s**-2), projected(operator, x))


@settings(max_examples=40, deadline=None)
@given(operators, seeds)
def test_one_scale_means_rows_of_one_length(operator: LinearOperator, seed: int) -> None:
    """A A^T = scale^2 I, where A^T y is found as the gradient of <A x, y>."""
    if operator.scale is None:
        return
    x = torch.zeros(1, *SHAPE, dtype=torch.float64, requires_grad=True)
    measured = operator.forward(x)
    y = random(seed, *measured.shape)
    (transposed,) = torch.autograd.grad(measured, x, y)
    torch.testing.assert_close(operator.forward(transposed), operator.scale**2 * y)


def test_a_mask_keeps_what_it_says() -> None:
    keep = torch.zeros(SHAPE, dtype=torch.bool)
    keep[0, 2, 3] = keep[2, 7, 15] = True
    x = random(0, 2, *SHAPE)
    assert torch.equal(Mask(keep).forward(x), torch.stack([x[:, 0, 2, 3], x[:, 2, 7, 15]], dim=1))
    assert torch.equal(projected(IDENTITY, x), x)


def test_block_mean_is_the_mean_of_blocks() -> None:
    x = random(0, 2, *SHAPE)
    slow = x.view(2, 3, 4, 2, 8, 2).mean(dim=(3, 5))
    torch.testing.assert_close(BlockMean(2).forward(x), slow)


def test_grey_keeps_grey_pictures_and_gives_them_back() -> None:
    """With the mean, A+ y is y in all three colours; with luma, the shortest colour that has this luma."""
    y = random(0, 2, 1, 8, 16)
    torch.testing.assert_close(Grey(MEAN).pinv(y), y.expand(2, 3, 8, 16))
    torch.testing.assert_close(Grey(LUMA).forward(y.expand(2, 3, 8, 16)), y)
    torch.testing.assert_close(Grey(LUMA).forward(Grey(LUMA).pinv(y)), y)


@pytest.mark.parametrize("std", [0.5, 1.0, 2.5])
def test_blur_is_the_convolution_within_its_cutoff(std: float) -> None:
    x, kernel, cutoff = random(0, 2, *SHAPE), gaussian_kernel(std), 0.05
    reach = len(kernel) // 2
    padded = np.pad(x.numpy(), ((0, 0), (0, 0), (reach, reach), (reach, reach)), mode="symmetric")
    for axis in (2, 3):
        padded = np.apply_along_axis(np.convolve, axis, padded, kernel.numpy(), mode="valid")
    exact = torch.from_numpy(padded)
    blur = Blur(kernel, *SHAPE[1:], cutoff=cutoff)
    assert (blur.forward(x) - exact).norm() < cutoff * x.norm()
    uncut = Blur(kernel, *SHAPE[1:], cutoff=1e-12)
    torch.testing.assert_close(uncut.forward(x), exact, rtol=0, atol=1e-10)


@settings(max_examples=20, deadline=None)
@given(blurs(), seeds)
def test_the_inverse_of_a_blur_is_bounded_by_its_cutoff(blur: Blur, seed: int) -> None:
    y = random(seed, 1, *SHAPE)
    assert blur.pinv(y).norm() <= y.norm() / (0.05 * blur.response.abs().max()) * (1 + 1e-9)


def test_the_shape_of_the_picture_decides_the_composition() -> None:
    x = random(0, 2, *SHAPE)
    small_grey, grey_small = Composition(BlockMean(2), Grey()), Composition(Grey(), BlockMean(2))
    torch.testing.assert_close(small_grey.forward(x), grey_small.forward(x))  # they commute
    torch.testing.assert_close(small_grey.pinv(small_grey.forward(x)), grey_small.pinv(grey_small.forward(x)))
    assert small_grey.scale == pytest.approx(Grey().scale / 2)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Composition(BlockMean(2), Blur(gaussian_kernel(1.0), 8, 16)), "Blur last"),
        (lambda: BlockMean(3).forward(torch.zeros(1, *SHAPE)), "divides both"),
        (lambda: BlockMean(0), "factor=0"),
        (lambda: Mask(torch.ones(SHAPE)), "booleans"),
        (lambda: IDENTITY.forward(torch.zeros(1, 3, 8, 8)), r"not \(3, 8, 8\)"),
        (lambda: Grey().forward(torch.zeros(1, 1, 8, 8)), r"not \(1, 8, 8\)"),
        (lambda: Grey((0.0, 0.0, 0.0)), "must count"),
        (lambda: Blur(torch.tensor([1.0, 2.0]), 8, 16), "odd number"),
        (lambda: Blur(gaussian_kernel(1.0), 8, 16, cutoff=0.0), "cutoff=0.0"),
    ],
)
def test_what_has_no_exact_inverse_is_refused(make, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()
