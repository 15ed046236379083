"""A text encoder without weights: one token for each word, of its first letters.

For what is to be seen of single tokens and captions: what a caption becomes can be written down, the longest text has five
tokens of four numbers, so networks stay small, and nothing is loaded.  Where an encoder is to be real, MiniLM is.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffusion.recipe import TrainRecipe
from diffusion.store import text_encoders
from diffusion.text import TextEncoder, TextIdentity

WIDTH, TOKENS = 4, 5


def embed(caption: str) -> Tensor:
    return torch.tensor([[ord(c) / 100 for c in word.ljust(WIDTH)[:WIDTH]] for word in caption.split()[:TOKENS]])


def words(name: str = "words", *, tokens: int = TOKENS, folder: Path | None = None, device: str = "cpu") -> TextEncoder:
    """As `text_encoders.text_encoder`, whatever the name."""
    return TextEncoder(TextIdentity(name=name, digest="0" * 64, width=WIDTH, tokens=tokens), embed, device)


def install(patch: pytest.MonkeyPatch) -> None:
    """Have it found instead of those with weights."""
    patch.setattr(text_encoders, "text_encoder", words)


def reading(recipe: TrainRecipe, *, tokens: int = TOKENS, width: int = WIDTH) -> TrainRecipe:
    """The same recipe with captions.  width: MiniLM's is 384."""
    changed = {"text_encoder": "minilm", "text_tokens": tokens, "unet": {"attention": (8,), "text_width": width}}
    return TrainRecipe.model_validate(
        recipe.model_dump() | changed | {"unet": recipe.unet.model_dump() | changed["unet"]}
    )
