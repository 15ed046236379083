"""The U-Net F: pictures, noise level and conditions in, pictures out.  It knows nothing of schedules or losses."""

import math
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

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


def heads_of(channels: int) -> int:
    """The number of attention heads: each has about _HEAD channels, and all have the same."""
    return next(heads for heads in range(max(1, channels // _HEAD), 0, -1) if channels % heads == 0)


def attend(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D)) v.  q (B, heads, N, D); k, v (B, heads, M, D); allowed (B, M) bool, where given with one true
    in every row.  Returns (B, N, heads * D).  [Vaswani et al. 2017, Eq. 1]
    """
    # written out: the maps are small, and the fused kernel's backward is 10 times slower on CPUs in bf16
    logits = q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)
    if allowed is not None:
        logits = logits.masked_fill(~allowed[:, None, None], -math.inf)
    return (logits.softmax(dim=-1).to(v.dtype) @ v).transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Self-attention over the positions of a picture, residual."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.heads = heads_of(channels)
        self.norm = nn.GroupNorm(channels // _GROUP, channels)
        self.qkv = Conv(channels, 3 * channels, 1)
        self.out = Conv(channels, channels, 1, zero=True)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W).  Returns the same shape."""
        b, c, h, w = x.shape
        qkv = self.qkv(self.norm(x)).permute(0, 2, 3, 1).reshape(b, h * w, 3, self.heads, c // self.heads)
        mixed = attend(*qkv.permute(2, 0, 3, 1, 4)).reshape(b, h, w, c)
        return x + self.out(mixed.permute(0, 3, 1, 2))


class Text(NamedTuple):
    """What a picture's positions may attend to: the tokens of its caption, or the null token alone."""

    tokens: Tensor  # (B, T, E)
    allowed: Tensor  # (B, T) bool, at least one true in every row


class CrossAttention(nn.Module):
    """Attention of the positions of a picture to the tokens of a text, residual.  [LDM, Sec. 3.3]"""

    def __init__(self, channels: int, text_width: int) -> None:
        super().__init__()
        self.heads = heads_of(channels)
        self.norm = nn.GroupNorm(channels // _GROUP, channels)
        self.q = Conv(channels, channels, 1)
        # no Conv, so none of Muon's matrices: like the stem it reads what comes from outside
        self.kv = nn.Linear(text_width, 2 * channels)
        self.out = Conv(channels, channels, 1, zero=True)

    def forward(self, x: Tensor, text: Text) -> Tensor:
        """x (B, C, H, W).  Returns the same shape."""
        b, c, h, w = x.shape
        q = self.q(self.norm(x)).permute(0, 2, 3, 1).reshape(b, h * w, self.heads, c // self.heads)
        kv = self.kv(text.tokens).unflatten(-1, (2, self.heads, c // self.heads))
        mixed = attend(q.transpose(1, 2), *kv.permute(2, 0, 3, 1, 4), text.allowed).reshape(b, h, w, c)
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
        self.text_attentions = nn.ModuleList()  # one for each attention, or none: `read_text`

    def read_text(self, text_width: int) -> None:
        """Follow each self-attention with a cross-attention.  Not in the constructor: weights that exist without text
        have the same initial values with it, so they are drawn first.
        """
        attentions = [attention for attention in self.attentions if isinstance(attention, Attention)]
        self.text_attentions.extend(
            CrossAttention(attention.out.weight.shape[0], text_width) for attention in attentions
        )

    def forward(self, x: Tensor, embedding: Tensor, text: Text | None, *, recompute: bool) -> Tensor:
        for i in range(len(self.blocks)):
            if recompute:
                x = checkpoint(self._step, i, x, embedding, text, use_reentrant=False)
            else:
                x = self._step(i, x, embedding, text)
        return x

    def _step(self, i: int, x: Tensor, embedding: Tensor, text: Text | None) -> Tensor:
        x = self.attentions[i](self.blocks[i](x, embedding))
        return self.text_attentions[i](x, text) if self.text_attentions else x


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
    """F(x, c_noise, label) and, where it was built for them, a text and a picture beside x.

    Pictures may have any height and width that stem x 2^(levels - 1) divides; `resolution` says at which levels, those
    whose maps of a square of that side have the sides `attention`, there is attention.

    The stem folds `stem` x `stem` pixels into channels, so that no convolution runs at full resolution: on CPUs and GPUs
    alike the time goes into few, wide, low-resolution convolutions, which run near the hardware's peak.  Skips are added,
    not concatenated, for the same reason.

    text_width: numbers in a token embedding, 0 for no text.  image_channels: of the picture beside x, 0 for none.  A new
    network with either answers as one without, and what both have starts with the same weights.
    recompute, set on the instance: blocks are computed again in the backward pass instead of kept, to the same bits, for
    a third more time.  [Chen et al. 2016, "Training deep nets with sublinear memory cost"]
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
        text_width: int = 0,
        image_channels: int = 0,
        seed: int = 0,
        picture_channels: int = 3,
    ) -> None:
        super().__init__()
        self.classes = classes
        self.fold = stem
        self.picture_channels, self.text_width, self.image_channels = picture_channels, text_width, image_channels
        self.recompute = False
        width = 4 * channels
        sizes = [channels * m for m in multipliers]
        sides = [resolution // stem // 2**i for i in range(len(sizes))]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embedding = Embedding(channels, width, classes)
            self.stem = Conv(picture_channels * stem**2, channels)
            self.down, self.up, self.merge = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
            for i, (size, side, depth) in enumerate(zip(sizes, sides, blocks, strict=True)):
                attends = side in attention
                before = sizes[i - 1] if i else channels
                self.down.append(Level(before, size, depth, width, dropout, attends))
                self.up.append(Level(size, size, depth, width, dropout, attends))
                if i:
                    self.merge.append(Conv(size, before, 1))
            self.norm = nn.GroupNorm(channels * multipliers[0] // _GROUP, channels * multipliers[0])
            self.head = Conv(channels * multipliers[0], picture_channels * stem**2, zero=True)
            # a stem of its own is the kernel of the concatenated input, cut in two
            self.image_stem = Conv(image_channels * stem**2, channels, zero=True) if image_channels else None
            if text_width:
                self.null_text = nn.Parameter(torch.randn(text_width))
                for level in (*self.down, *self.up):
                    level.read_text(text_width)

    def forward(
        self,
        x: Tensor,
        c_noise: Tensor,
        label: Tensor,
        *,
        text: Tensor | None = None,
        text_mask: Tensor | None = None,
        image: Tensor | None = None,
    ) -> Tensor:
        """x (B, C, H, W), c_noise (B,), label (B,) int64 in [0, classes].  Returns (B, C, H, W).

        text (B, T, text_width), text_mask (B, T) bool, true at tokens: a row without any, or no text at all, is the null
        text.  image (B, image_channels, H, W); none is a picture of zeros.
        """
        embedding = self.embedding(c_noise, label)
        read = self._read(text, text_mask, len(x))
        h = self.stem(self._folded(x))
        if self.image_stem is not None:
            h = h + self.image_stem(self._folded(self._beside(x, image)))
        elif image is not None:
            raise ValueError("this network reads no picture beside x: build it with `image_channels`")
        recompute = self.recompute and torch.is_grad_enabled()
        skips = []
        for i, level in enumerate(self.down):
            h = level(F.avg_pool2d(h, 2) if i else h, embedding, read, recompute=recompute)
            skips.append(h)
        for i in reversed(range(len(self.up))):
            if i < len(self.up) - 1:
                h = skips[i] + F.interpolate(self.merge[i](h), scale_factor=2.0, mode="nearest")
            h = self.up[i](h, embedding, read, recompute=recompute)
        h = self.head(F.silu(self.norm(h)))
        return F.pixel_shuffle(h, self.fold) if self.fold > 1 else h

    def _folded(self, x: Tensor) -> Tensor:
        return F.pixel_unshuffle(x, self.fold) if self.fold > 1 else x

    def _beside(self, x: Tensor, image: Tensor | None) -> Tensor:
        shape = (len(x), self.image_channels, *x.shape[2:])
        if image is None:  # zeros and not nothing: every parameter takes part in every call, as data parallelism needs
            return x.new_zeros(shape)
        if image.shape != shape:
            raise ValueError(f"image has the shape {tuple(image.shape)}: beside this x it must be {shape}")
        return image.contiguous(memory_format=torch.channels_last)

    def _read(self, text: Tensor | None, mask: Tensor | None, rows: int) -> Text | None:
        """The tokens behind the null token, which is read where there are no others."""
        if not self.text_width:
            if text is not None or mask is not None:
                raise ValueError("this network reads no text: build it with `text_width`")
            return None
        null = self.null_text.expand(rows, 1, -1)
        if text is None:
            if mask is not None:
                raise ValueError("text_mask without text: give the embeddings of its tokens too")
            return Text(null, null.new_ones(rows, 1, dtype=torch.bool))
        if text.ndim != 3 or (len(text), text.shape[2]) != (rows, self.text_width):
            raise ValueError(f"text has the shape {tuple(text.shape)}: it must be ({rows}, tokens, {self.text_width})")
        mask = text.new_ones(text.shape[:2], dtype=torch.bool) if mask is None else mask
        if mask.shape != text.shape[:2] or mask.dtype != torch.bool:
            raise ValueError(f"text_mask is {mask.dtype} {tuple(mask.shape)}: it must be bool {tuple(text.shape[:2])}")
        # encoders differ in scale by two orders of magnitude: kv is to see unit variance from all
        tokens = F.layer_norm(text, (self.text_width,))
        return Text(torch.cat([null.to(tokens), tokens], dim=1), torch.cat([~mask.any(1, keepdim=True), mask], dim=1))
