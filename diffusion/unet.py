"""The U-Net F: pictures, noise level and label in, pictures out.  It knows nothing of schedules or losses."""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_GROUP = 16  # channels per normalization group
_HEAD = 32  # channels per attention head, about


class Conv(nn.Module):
    """A convolution that keeps the picture's size.  `zero` starts it at 0, so that what it ends is an identity at first.

    The weight is one row per output channel, (out, size * size * in), laid out as channels_last wants it: a matrix, which
    is what optimizers that look at matrices need.  [Muon]
    """

    def __init__(self, in_channels: int, out_channels: int, size: int = 3, *, zero: bool = False) -> None:
        super().__init__()
        self.size = size
        self.weight = nn.Parameter(torch.zeros(out_channels, size * size * in_channels))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        if not zero:
            bound = self.weight.shape[1] ** -0.5
            nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, in, H, W).  Returns (B, out, H, W)."""
        kernel = self.weight.unflatten(1, (self.size, self.size, -1)).permute(0, 3, 1, 2)
        return F.conv2d(x, kernel, self.bias, padding=self.size // 2)


class Block(nn.Module):
    """Residual block; the embedding scales and shifts its second normalization.  [ADM, Sec. 3]"""

    def __init__(self, in_channels: int, out_channels: int, embedding: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(in_channels // _GROUP, in_channels)
        self.conv1 = Conv(in_channels, out_channels)
        self.modulation = nn.Linear(embedding, 2 * out_channels)
        self.norm2 = nn.GroupNorm(out_channels // _GROUP, out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = Conv(out_channels, out_channels, zero=True)
        self.skip = Conv(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x (B, in, H, W), embedding (B, E).  Returns (B, out, H, W)."""
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.modulation(embedding)[:, :, None, None].chunk(2, dim=1)
        h = F.silu(torch.addcmul(shift, self.norm2(h), 1 + scale))
        return self.skip(x) + self.conv2(self.dropout(h))


class Attention(nn.Module):
    """Self-attention over the positions of a picture, residual."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.heads = max(1, channels // _HEAD)
        self.norm = nn.GroupNorm(channels // _GROUP, channels)
        self.qkv = Conv(channels, 3 * channels, 1)
        self.out = Conv(channels, channels, 1, zero=True)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W).  Returns the same shape."""
        b, c, h, w = x.shape
        qkv = self.qkv(self.norm(x)).permute(0, 2, 3, 1).reshape(b, h * w, 3, self.heads, c // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        # written out: the maps are small, and the fused kernel's backward is 10 times slower on CPUs in bf16
        weights = (q * (c // self.heads) ** -0.5 @ k.transpose(-1, -2)).softmax(dim=-1)
        mixed = (weights.to(v.dtype) @ v).transpose(1, 2).reshape(b, h, w, c)
        return x + self.out(mixed.permute(0, 3, 1, 2))


class Level(nn.Module):
    """The blocks of one resolution, the first of which may change the number of channels."""

    def __init__(
        self, in_channels: int, out_channels: int, blocks: int, embedding: int, dropout: float, attention: bool
    ) -> None:
        super().__init__()
        sizes = [in_channels] + [out_channels] * blocks
        self.blocks = nn.ModuleList(Block(a, b, embedding, dropout) for a, b in pairwise(sizes))
        self.attentions = nn.ModuleList(Attention(out_channels) if attention else nn.Identity() for _ in self.blocks)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        for block, attention in zip(self.blocks, self.attentions, strict=True):
            x = attention(block(x, embedding))
        return x


class Embedding(nn.Module):
    """Noise level (as Fourier features of c_noise) and label, as one vector."""

    def __init__(self, channels: int, width: int, classes: int) -> None:
        super().__init__()
        # c_noise = ln(sigma) / 4 spans about [-1.6, 1.1]: periods from 8 down to 1 / 8
        self.register_buffer("frequencies", 2 * math.pi * 2 ** torch.linspace(-3, 3, channels // 2), persistent=False)
        self.noise = nn.Linear(channels, width)
        self.label = nn.Embedding(classes + 1, width)  # the last row is the null label
        self.out = nn.Linear(width, width)

    def forward(self, c_noise: Tensor, label: Tensor) -> Tensor:
        """c_noise (B,), label (B,) int64.  Returns (B, width)."""
        angle = c_noise[:, None] * self.frequencies
        features = torch.cat([angle.cos(), angle.sin()], dim=1)
        return F.silu(self.out(F.silu(self.noise(features) + self.label(label))))


class UNet(nn.Module):
    """F(x, c_noise, label).

    The stem folds `stem` x `stem` pixels into channels, so that no convolution runs at full resolution: on CPUs and GPUs
    alike the time goes into few, wide, low-resolution convolutions, which run near the hardware's peak.  Skips are added,
    not concatenated, for the same reason.
    """

    def __init__(
        self,
        *,
        resolution: int,
        classes: int,
        channels: int,
        multipliers: tuple[int, ...],
        blocks: tuple[int, ...],
        attention: tuple[int, ...],
        stem: int,
        dropout: float = 0.0,
        seed: int = 0,
        picture_channels: int = 3,
    ) -> None:
        super().__init__()
        self.classes = classes
        self.fold = stem
        width = 4 * channels
        sizes = [channels * m for m in multipliers]
        sides = [resolution // stem // 2**i for i in range(len(sizes))]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embedding = Embedding(channels, width, classes)
            self.stem = Conv(picture_channels * stem**2, channels)
            self.down, self.up, self.merge = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
            for i, (size, side, depth) in enumerate(zip(sizes, sides, blocks, strict=True)):
                attend = side in attention
                before = sizes[max(i - 1, 0)]
                self.down.append(Level(before, size, depth, width, dropout, attend))
                self.up.append(Level(size, size, depth, width, dropout, attend))
                if i:
                    self.merge.append(Conv(size, before, 1))
            self.norm = nn.GroupNorm(channels * multipliers[0] // _GROUP, channels * multipliers[0])
            self.head = Conv(channels * multipliers[0], picture_channels * stem**2, zero=True)

    def forward(self, x: Tensor, c_noise: Tensor, label: Tensor) -> Tensor:
        """x (B, C, H, W), c_noise (B,), label (B,) int64 in [0, classes].  Returns (B, C, H, W)."""
        embedding = self.embedding(c_noise, label)
        h = self.stem(F.pixel_unshuffle(x, self.fold) if self.fold > 1 else x)
        skips = []
        for i, level in enumerate(self.down):
            h = level(F.avg_pool2d(h, 2) if i else h, embedding)
            skips.append(h)
        for i in reversed(range(len(self.up))):
            if i < len(self.up) - 1:
                h = skips[i] + F.interpolate(self.merge[i](h), scale_factor=2.0, mode="nearest")
            h = self.up[i](h, embedding)
        h = self.head(F.silu(self.norm(h)))
        return F.pixel_shuffle(h, self.fold) if self.fold > 1 else h
