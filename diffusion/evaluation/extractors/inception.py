"""Inception-v3 as the Frechet distances of papers use it: TensorFlow's network of 2015, whose last poolings differ from the
paper's, up to its 2,048 pooled features.  [Szegedy et al. 2016; the graph released with it]

Its modules have the names of the weights that circulate for PyTorch, so that such a file loads as it is.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DIMENSIONS = 2048

# the graph leaves the border out of its means, where the paper's network counts it as zeros
_mean3 = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
_max3 = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
_halve = partial(F.max_pool2d, kernel_size=3, stride=2)


class _Conv(nn.Module):
    """A convolution, its batch norm, ReLU."""

    def __init__(
        self, inputs: int, outputs: int, size: int | tuple[int, int], stride: int = 1, same: bool = True
    ) -> None:
        super().__init__()
        sides = (size, size) if isinstance(size, int) else size
        padding = tuple(side // 2 for side in sides) if same else 0
        self.conv = nn.Conv2d(inputs, outputs, sides, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class _Block(nn.Module):
    """Branches side by side.  Each is a chain of convolutions by their names; a tuple in its place forks at its end."""

    def __init__(
        self,
        convolutions: dict[str, _Conv],
        branches: tuple[tuple[str | tuple[str, str], ...], ...],
        pool: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__()
        for name, convolution in convolutions.items():
            self.add_module(name, convolution)
        self.branches, self.pool = branches, pool

    def forward(self, x: Tensor) -> Tensor:
        parts = []
        for branch in self.branches:
            y = x
            for name in branch:
                y = self._both(y, name) if isinstance(name, tuple) else self.get_submodule(name)(y)
            parts.append(y)
        pooled = self.pool(x)
        parts.append(self.branch_pool(pooled) if hasattr(self, "branch_pool") else pooled)
        return torch.cat(parts, dim=1)

    def _both(self, x: Tensor, names: tuple[str, str]) -> Tensor:
        return torch.cat([self.get_submodule(name)(x) for name in names], dim=1)


def _a(inputs: int, pooled: int) -> _Block:
    """35 x 35.  [Szegedy et al. 2016, Fig. 5]"""
    return _Block(
        {
            "branch1x1": _Conv(inputs, 64, 1),
            "branch5x5_1": _Conv(inputs, 48, 1),
            "branch5x5_2": _Conv(48, 64, 5),
            "branch3x3dbl_1": _Conv(inputs, 64, 1),
            "branch3x3dbl_2": _Conv(64, 96, 3),
            "branch3x3dbl_3": _Conv(96, 96, 3),
            "branch_pool": _Conv(inputs, pooled, 1),
        },
        (("branch1x1",), ("branch5x5_1", "branch5x5_2"), ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3")),
        _mean3,
    )


def _b(inputs: int) -> _Block:
    """35 x 35 -> 17 x 17.  [Fig. 10]"""
    return _Block(
        {
            "branch3x3": _Conv(inputs, 384, 3, 2, same=False),
            "branch3x3dbl_1": _Conv(inputs, 64, 1),
            "branch3x3dbl_2": _Conv(64, 96, 3),
            "branch3x3dbl_3": _Conv(96, 96, 3, 2, same=False),
        },
        (("branch3x3",), ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3")),
        _halve,
    )


def _c(inner: int) -> _Block:
    """17 x 17.  [Fig. 6]"""
    double = [f"branch7x7dbl_{i}" for i in range(1, 6)]
    return _Block(
        {
            "branch1x1": _Conv(768, 192, 1),
            "branch7x7_1": _Conv(768, inner, 1),
            "branch7x7_2": _Conv(inner, inner, (1, 7)),
            "branch7x7_3": _Conv(inner, 192, (7, 1)),
            double[0]: _Conv(768, inner, 1),
            double[1]: _Conv(inner, inner, (7, 1)),
            double[2]: _Conv(inner, inner, (1, 7)),
            double[3]: _Conv(inner, inner, (7, 1)),
            double[4]: _Conv(inner, 192, (1, 7)),
            "branch_pool": _Conv(768, 192, 1),
        },
        (("branch1x1",), ("branch7x7_1", "branch7x7_2", "branch7x7_3"), tuple(double)),
        _mean3,
    )


def _d() -> _Block:
    """17 x 17 -> 8 x 8."""
    return _Block(
        {
            "branch3x3_1": _Conv(768, 192, 1),
            "branch3x3_2": _Conv(192, 320, 3, 2, same=False),
            "branch7x7x3_1": _Conv(768, 192, 1),
            "branch7x7x3_2": _Conv(192, 192, (1, 7)),
            "branch7x7x3_3": _Conv(192, 192, (7, 1)),
            "branch7x7x3_4": _Conv(192, 192, 3, 2, same=False),
        },
        (("branch3x3_1", "branch3x3_2"), ("branch7x7x3_1", "branch7x7x3_2", "branch7x7x3_3", "branch7x7x3_4")),
        _halve,
    )


def _e(inputs: int, pool: Callable[[Tensor], Tensor]) -> _Block:
    """8 x 8.  [Fig. 7]"""
    return _Block(
        {
            "branch1x1": _Conv(inputs, 320, 1),
            "branch3x3_1": _Conv(inputs, 384, 1),
            "branch3x3_2a": _Conv(384, 384, (1, 3)),
            "branch3x3_2b": _Conv(384, 384, (3, 1)),
            "branch3x3dbl_1": _Conv(inputs, 448, 1),
            "branch3x3dbl_2": _Conv(448, 384, 3),
            "branch3x3dbl_3a": _Conv(384, 384, (1, 3)),
            "branch3x3dbl_3b": _Conv(384, 384, (3, 1)),
            "branch_pool": _Conv(inputs, 192, 1),
        },
        (
            ("branch1x1",),
            ("branch3x3_1", ("branch3x3_2a", "branch3x3_2b")),
            ("branch3x3dbl_1", "branch3x3dbl_2", ("branch3x3dbl_3a", "branch3x3dbl_3b")),
        ),
        pool,
    )


class Inception(nn.Module):
    """float32 (B, 3, 299, 299) in [0, 255] -> (B, 2048).  Other sides from 75 work too."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Conv(3, 32, 3, 2, same=False)
        self.Conv2d_2a_3x3 = _Conv(32, 32, 3, same=False)
        self.Conv2d_2b_3x3 = _Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = _Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = _Conv(80, 192, 3, same=False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _a(192, 32), _a(256, 64), _a(288, 64)
        self.Mixed_6a = _b(288)
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = _c(128), _c(160), _c(160), _c(192)
        self.Mixed_7a = _d()
        self.Mixed_7b = _e(1280, _mean3)
        self.Mixed_7c = _e(2048, _max3)  # in the graph alone: the paper's network takes the mean here, too

    def forward(self, x: Tensor) -> Tensor:
        x = (x - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(_halve(x)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(_halve(x))))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        return x.mean(dim=(2, 3))


def inception(weights: dict[str, Tensor]) -> Inception:
    """The network of these weights; those of the classes, `fc`, are not needed.  Raises ValueError where they do not fit."""
    network = Inception()
    own = {name: value for name, value in weights.items() if not name.startswith(("fc.", "AuxLogits."))}
    try:
        found = network.load_state_dict(own, strict=False)
    except RuntimeError as error:
        raise ValueError(f"these are not the weights of Inception-v3: {str(error).splitlines()[1].strip()}") from error
    # files of old versions have no counts of batches, which nothing here reads
    missing = [name for name in found.missing_keys if not name.endswith("num_batches_tracked")]
    if missing or found.unexpected_keys:
        name = (missing or found.unexpected_keys)[0]
        raise ValueError(f"these are not the weights of Inception-v3: {name} is {'missing' if missing else 'unknown'}")
    return network.eval().requires_grad_(False)
