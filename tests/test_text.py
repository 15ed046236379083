"""text.py: BERT is torch's own encoder; a caption's embedding is its own; an empty caption has none."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from diffusion.text import TextEncoder, TextIdentity, bert, remembering

LAYERS, HEADS, WIDTH, EPS = 2, 3, 24, 1e-12
WORDS = 100


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    """A small BERT's, under the names of the published files."""
    generator = torch.Generator().manual_seed(0)
    linears = {
        "attention.self.query": (WIDTH, WIDTH),
        "attention.self.key": (WIDTH, WIDTH),
        "attention.self.value": (WIDTH, WIDTH),
        "attention.output.dense": (WIDTH, WIDTH),
        "intermediate.dense": (4 * WIDTH, WIDTH),
        "output.dense": (WIDTH, 4 * WIDTH),
    }
    shapes = {
        "embeddings.word_embeddings.weight": (WORDS, WIDTH),
        "embeddings.position_embeddings.weight": (40, WIDTH),
        "embeddings.token_type_embeddings.weight": (2, WIDTH),
        "embeddings.LayerNorm": (WIDTH,),
    }
    for i in range(LAYERS):
        for name, shape in linears.items():
            shapes[f"encoder.layer.{i}.{name}.weight"] = shape
            shapes[f"encoder.layer.{i}.{name}.bias"] = shape[:1]
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            shapes[f"encoder.layer.{i}.{name}"] = (WIDTH,)
    made = {}
    for name, shape in shapes.items():
        draw = 0.3 * torch.randn(2, *shape, generator=generator)
        if name.endswith("LayerNorm"):
            made[f"{name}.weight"], made[f"{name}.bias"] = 1 + draw
        else:
            made[name] = draw[0]
    return made


def embed(weights: dict[str, Tensor], ids: Tensor) -> Tensor:
    return bert(weights, ids, layers=LAYERS, heads=HEADS, eps=EPS)


def torchs(weights: dict[str, Tensor]) -> nn.TransformerEncoder:
    """The same weights in torch's own transformer."""
    layer = nn.TransformerEncoderLayer(
        WIDTH, HEADS, 4 * WIDTH, dropout=0.0, activation="gelu", layer_norm_eps=EPS, batch_first=True
    )
    network = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False).eval()
    names = {
        "self_attn.out_proj": "attention.output.dense",
        "norm1": "attention.output.LayerNorm",
        "linear1": "intermediate.dense",
        "linear2": "output.dense",
        "norm2": "output.LayerNorm",
    }
    state = {}
    for i in range(LAYERS):
        theirs = f"encoder.layer.{i}"
        for kind in ("weight", "bias"):
            for own, name in names.items():
                state[f"layers.{i}.{own}.{kind}"] = weights[f"{theirs}.{name}.{kind}"]
            qkv = [weights[f"{theirs}.attention.self.{name}.{kind}"] for name in ("query", "key", "value")]
            state[f"layers.{i}.self_attn.in_proj_{kind}"] = torch.cat(qkv)
    network.load_state_dict(state)
    return network


@torch.no_grad()
@pytest.mark.parametrize(("rows", "tokens"), [(1, 1), (1, 40), (3, 7)])
def test_bert_is_torchs_encoder_over_its_three_embeddings(weights, rows, tokens):
    ids = torch.randint(WORDS, (rows, tokens), generator=torch.Generator().manual_seed(tokens))
    embedded = (
        weights["embeddings.word_embeddings.weight"][ids]
        + weights["embeddings.position_embeddings.weight"][:tokens]
        + weights["embeddings.token_type_embeddings.weight"][0]
    )
    norm = [weights[f"embeddings.LayerNorm.{kind}"] for kind in ("weight", "bias")]
    expected = torchs(weights)(nn.functional.layer_norm(embedded, (WIDTH,), *norm, EPS))
    torch.testing.assert_close(embed(weights, ids), expected, rtol=1e-5, atol=1e-5)


@pytest.fixture
def encoder(weights) -> TextEncoder:
    """Letters are tokens, 12 of them at most."""
    identity = TextIdentity(name="letters", digest="0" * 64, width=WIDTH, tokens=12)
    return TextEncoder(identity, lambda text: embed(weights, torch.tensor([[ord(c) % WORDS for c in text][:12]]))[0])


def test_a_caption_is_its_own_whatever_stands_beside_it(encoder):
    captions = ["a red flag", "no", "", "a very long caption", "no", "  "]
    text, mask = encoder(captions)
    assert text.shape == (6, 12, WIDTH)
    assert text.dtype == torch.float32
    assert mask.sum(1).tolist() == [10, 2, 0, 12, 2, 0]
    for row, caption in enumerate(captions):
        alone = encoder([caption])
        assert torch.equal(alone.text[0], text[row])
        assert torch.equal(alone.text_mask[0], mask[row])
    assert not text[~mask].any()
    assert text[mask].abs().amin(dim=1).min() > 0
    assert not torch.equal(text[0], text[3])


def test_no_captions_are_no_rows(encoder):
    assert encoder([]).text.shape == (0, 12, WIDTH)


def test_one_string_is_not_a_list_of_captions(encoder):
    with pytest.raises(ValueError, match=r"\['a flag'\] for a single one"):
        encoder("a flag")


def test_what_is_remembered_is_the_same_and_computed_once(encoder):
    read = []

    def embed(caption: str) -> Tensor:
        read.append(caption)
        return encoder.embed(caption)

    remembered = remembering(replace(encoder, embed=embed), 2)
    captions = ["one", "two", "one", "", "two"]
    for found, expected in zip(remembered(captions), encoder(captions), strict=True):
        assert torch.equal(found, expected)
    assert read == ["one", "two"]
    remembered(["three", "one"])
    assert read == ["one", "two", "three", "one"]
