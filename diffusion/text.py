"""Text encoders behind one signature: captions in, embeddings of their tokens out.  They are frozen: nothing here learns.

`store.text_encoders` finds, verifies and loads their weights.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion.recipe import Frozen
from diffusion.threads import one_thread
from diffusion.unet import attend


class TextIdentity(Frozen):
    """What must be equal for a caption to become the same numbers: a network reads the encoder that it was trained on."""

    name: str
    digest: str  # of weights and tokenizer: sha256 of the names and sha256 of their files
    width: int  # numbers in a token embedding
    tokens: int  # the most that are read of a caption, the encoder's own marks among them
    precision: str = "float32"

    def __str__(self) -> str:
        return f"{self.name} {self.digest[:12]} ({self.tokens} tokens of {self.width} numbers, {self.precision})"


class TextCondition(NamedTuple):
    """Captions as `UNet.forward` reads them."""

    text: Tensor  # (B, T, width) float32, zeros where there is no token
    text_mask: Tensor  # (B, T) bool, true at tokens; a row without any is the null text


@dataclass(frozen=True)
class TextEncoder:
    """Captions -> embeddings of their tokens.  An empty caption has none.

    Each caption is encoded alone, without padding and by one thread, so what it becomes depends neither on those beside it
    nor on the threads of its process, in no bit.  T is always identity.tokens, so that captions of different calls can be
    put together.
    """

    identity: TextIdentity
    embed: Callable[[str], Tensor]  # a caption that is not empty -> (n, width), n from 1 to identity.tokens
    device: str = "cpu"

    @torch.no_grad()
    @one_thread()
    def __call__(self, captions: Sequence[str]) -> TextCondition:
        if isinstance(captions, str):
            raise ValueError(f"captions={captions!r}: give a list of captions, [{captions!r}] for a single one")
        shape = (len(captions), self.identity.tokens)
        text = torch.zeros(*shape, self.identity.width, device=self.device)
        mask = torch.zeros(shape, dtype=torch.bool, device=self.device)
        for row, caption in enumerate(captions):
            if caption.strip():
                tokens = self.embed(caption)
                text[row, : len(tokens)], mask[row, : len(tokens)] = tokens, True
        return TextCondition(text, mask)


def remembering(encoder: TextEncoder, captions: int) -> TextEncoder:
    """The same encoder, which computes a caption again only after so many others.  The embeddings stay on its device."""
    return replace(encoder, embed=lru_cache(captions)(encoder.embed))


def looking_up(encoder: TextEncoder, find: Callable[[str], Tensor | None]) -> TextEncoder:
    """The same encoder, which computes what `find` does not have.  find(caption): the bits of encoder.embed(caption)."""

    def embed(caption: str) -> Tensor:
        found = find(caption)
        return encoder.embed(caption) if found is None else found.to(encoder.device)

    return replace(encoder, embed=embed)


def bert(weights: Mapping[str, Tensor], ids: Tensor, *, layers: int, heads: int, eps: float) -> Tensor:
    """The last hidden states of BERT.  ids (B, n) int64, without padding.  Returns (B, n, E).  [Devlin et al. 2019, Sec. 3]

    weights: by the names of the published files.
    """

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps)

    words, places, kinds = (
        weights[f"embeddings.{name}_embeddings.weight"] for name in ("word", "position", "token_type")
    )
    x = norm(words[ids] + places[: ids.shape[1]] + kinds[0], "embeddings.LayerNorm")
    for layer in (f"encoder.layer.{i}" for i in range(layers)):
        projected = (linear(x, f"{layer}.attention.self.{name}") for name in ("query", "key", "value"))
        mixed = attend(*(part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in projected))
        x = norm(x + linear(mixed, f"{layer}.attention.output.dense"), f"{layer}.attention.output.LayerNorm")
        hidden = F.gelu(linear(x, f"{layer}.intermediate.dense"))
        x = norm(x + linear(hidden, f"{layer}.output.dense"), f"{layer}.output.LayerNorm")
    return x
