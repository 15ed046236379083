"""Linear measurements y = A x0 of a picture, each with its exact pseudo-inverse: what restoration is told about x0.

Every operator here is a few lines because its singular vectors are known: no matrix of the picture's size is ever made.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

LUMA = (0.299, 0.587, 0.114)  # the eye's share of red, green and blue  [ITU-R BT.601]
MEAN = (1 / 3, 1 / 3, 1 / 3)

Gain = Callable[[Tensor], Tensor]  # singular values, any shape, > 0 -> factors of that shape


class LinearOperator(Protocol):
    """A = U S V^T.  x (B, C, H, W), y (B, ...) in the operator's own shape."""

    @property
    def scale(self) -> float | None:
        """The singular value other than 0 if there is one only, so that A A^T = scale^2 I; None if they differ."""

    def forward(self, x: Tensor) -> Tensor:
        """A x."""

    def pinv(self, y: Tensor) -> Tensor:
        """A+ y, of all x with the smallest ||A x - y|| the shortest.  [Moore-Penrose]"""

    def spectral(self, x: Tensor, gain: Gain) -> Tensor:
        """V gain(S) V^T x over the singular values above 0: gain = 1 gives A+ A x.  Returns the shape of x."""


def _one_value(operator: LinearOperator, x: Tensor, gain: Gain) -> Tensor:
    """`spectral` where A A^T = scale^2 I: the projection A+ A, scaled."""
    return float(gain(torch.tensor(operator.scale, dtype=torch.float64))) * operator.pinv(operator.forward(x))


@dataclass(frozen=True, eq=False)
class Mask:
    """The pixels where `keep` is true, as rows of numbers: inpainting knows these.  y (B, number kept)."""

    keep: Tensor  # (C, H, W) bool; values of a pixel may be kept one by one, as a camera's colour filter does
    scale = 1.0

    def __post_init__(self) -> None:
        if self.keep.dtype != torch.bool or self.keep.dim() != 3:
            raise ValueError(
                f"keep is {self.keep.dtype} {tuple(self.keep.shape)}: give booleans of the shape (C, H, W)"
            )

    def forward(self, x: Tensor) -> Tensor:
        return _shaped(x, tuple(self.keep.shape), "Mask")[:, self.keep.to(x.device)]

    def pinv(self, y: Tensor) -> Tensor:
        x = y.new_zeros(len(y), *self.keep.shape)
        x[:, self.keep.to(y.device)] = y
        return x

    def spectral(self, x: Tensor, gain: Gain) -> Tensor:
        # as `_one_value`, without a count of the kept numbers, for which a GPU would be waited for
        factor = float(gain(torch.ones((), dtype=torch.float64)))
        return torch.where(self.keep.to(x.device), factor * _shaped(x, tuple(self.keep.shape), "Mask"), 0.0)


@dataclass(frozen=True)
class BlockMean:
    """The mean of each block of factor x factor pixels: super-resolution knows these.  y (B, C, H / factor, W / factor)."""

    factor: int
    spectral = _one_value

    def __post_init__(self) -> None:
        if self.factor < 1:
            raise ValueError(f"factor={self.factor}: give a whole number of pixels, such as 2, 4 or 8")

    @property
    def scale(self) -> float:
        return 1 / self.factor  # a row holds factor^2 numbers 1 / factor^2

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        if height % self.factor or width % self.factor:
            raise ValueError(
                f"{height} x {width} pixels have no blocks of {self.factor}: choose a factor that divides both"
            )
        return torch.nn.functional.avg_pool2d(x, self.factor)

    def pinv(self, y: Tensor) -> Tensor:
        return y.repeat_interleave(self.factor, dim=2).repeat_interleave(self.factor, dim=3)


@dataclass(frozen=True)
class Grey:
    """One weighted sum of the colours a pixel: colorization knows these.  y (B, 1, H, W)."""

    weights: tuple[float, ...] = LUMA  # one for each channel; with sum 1 the grey of a grey picture is itself
    spectral = _one_value

    def __post_init__(self) -> None:
        if not any(self.weights):
            raise ValueError(f"weights={self.weights}: at least one colour must count")

    @property
    def scale(self) -> float:
        return math.sqrt(sum(weight**2 for weight in self.weights))

    def forward(self, x: Tensor) -> Tensor:
        weights = _column(self.weights, x)
        return (weights * _shaped(x, (len(self.weights), *x.shape[2:]), "Grey")).sum(dim=1, keepdim=True)

    def pinv(self, y: Tensor) -> Tensor:
        return _column(self.weights, y) * (y / self.scale**2)


class Blur:
    """Convolution of rows and columns with one symmetric kernel, the picture mirrored at its borders.  y (B, C, H, W).

    The cosines of the DCT-II are its singular vectors, with the values s_ij = |h_i h_j|, h_i = sum_k kernel_k cos(pi i k
    / n).  [Strang 1999, "The Discrete Cosine Transform"]  Values below `cutoff` times the largest are set to 0 in A
    itself, so A and A+ are an exact pair: A differs from the convolution by less than `cutoff` of the picture, and A+
    makes no error of y larger than 1 / cutoff times (the rounding of 8-bit pictures is 0.0023).
    """

    scale = None

    def __init__(self, kernel: Tensor, height: int, width: int, *, cutoff: float = 0.05) -> None:
        if kernel.dim() != 1 or len(kernel) % 2 == 0 or not torch.allclose(kernel, kernel.flip(0)):
            raise ValueError(f"kernel {kernel.tolist()}: give an odd number of weights, the same from both ends")
        if not 0 < cutoff < 1:
            raise ValueError(f"cutoff={cutoff}: give a share of the largest singular value, between 0 and 1")
        self.rows, response_rows = _mirrored(kernel, height)
        self.columns, response_columns = _mirrored(kernel, width)
        response = response_rows[:, None] * response_columns
        self.response = torch.where(response.abs() < cutoff * response.abs().max(), 0.0, response)  # (H, W)

    def forward(self, x: Tensor) -> Tensor:
        return self._filtered(_shaped(x, (x.shape[1], *self.response.shape), "Blur"), self.response)

    def pinv(self, y: Tensor) -> Tensor:
        return self._filtered(y, torch.where(self.response == 0, 0.0, 1 / self.response))

    def spectral(self, x: Tensor, gain: Gain) -> Tensor:
        kept = self.response != 0
        factors = torch.zeros_like(self.response)
        factors[kept] = gain(self.response[kept].abs())
        return self._filtered(x, factors)

    def _filtered(self, x: Tensor, factors: Tensor) -> Tensor:
        """Each frequency times its factor.  factors: (H, W)."""
        rows, columns = self.rows.to(x), self.columns.to(x)
        return rows.T @ (factors.to(x) * (rows @ x @ columns.T)) @ columns


def gaussian_kernel(std: float) -> Tensor:
    """Weights of a Gaussian blur, sum 1, up to 4 standard deviations (in pixels).  Returns (2 k + 1,) float64."""
    reach = math.ceil(4 * std)
    weights = torch.exp(-(torch.arange(-reach, reach + 1, dtype=torch.float64) ** 2) / (2 * std**2))
    return weights / weights.sum()


class Composition:
    """A = outer inner: `inner` first, then `outer` on what it gives, such as the block mean of a grey picture.

    (outer inner)+ = inner+ outer+ does not hold for all operators.  It does where inner inner^T = scale^2 I: then
    inner+ outer+ outer inner = inner^T (outer+ outer) inner / scale^2 is symmetric, and outer inner inner+ outer+ =
    outer outer+; the other two laws follow.  [Greville 1966]  Every `inner` without that is refused.
    """

    def __init__(self, outer: LinearOperator, inner: LinearOperator) -> None:
        if inner.scale is None:
            raise ValueError(
                f"{type(inner).__name__} cannot come first: its singular values differ, so the product's pseudo-inverse"
                f" is not the product of the two. Blur last: Composition(blur, {type(outer).__name__}(...)) is exact"
            )
        self.outer, self.inner = outer, inner

    @property
    def scale(self) -> float | None:
        return None if self.outer.scale is None else self.outer.scale * self.inner.scale

    def forward(self, x: Tensor) -> Tensor:
        return self.outer.forward(self.inner.forward(x))

    def pinv(self, y: Tensor) -> Tensor:
        return self.inner.pinv(self.outer.pinv(y))

    def spectral(self, x: Tensor, gain: Gain) -> Tensor:
        # the right singular vectors are inner^T v / scale for those v of outer, the values scale times outer's
        inner = self.inner
        return inner.pinv(self.outer.spectral(inner.forward(x), lambda values: gain(inner.scale * values)))


def _column(weights: tuple[float, ...], like: Tensor) -> Tensor:
    return torch.tensor(weights, dtype=like.dtype, device=like.device).view(1, -1, 1, 1)


def _mirrored(kernel: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The orthonormal DCT-II (n, n), and the kernel's response (n,) at each of its frequencies, float64."""
    frequency = torch.arange(n, dtype=torch.float64)
    cosines = torch.cos(math.pi / n * frequency[:, None] * (frequency + 0.5))
    basis = cosines / cosines.norm(dim=1, keepdim=True)
    offset = torch.arange(len(kernel), dtype=torch.float64) - len(kernel) // 2
    return basis, torch.cos(math.pi / n * frequency[:, None] * offset) @ kernel.double()


def _shaped(x: Tensor, shape: tuple[int, ...], name: str) -> Tensor:
    if tuple(x.shape[1:]) != shape:
        raise ValueError(f"{name} measures pictures of the shape {shape}, not {tuple(x.shape[1:])}")
    return x
