"""Codecs: diffusers' own latents and pictures, the same bits beside any neighbours, and another folder is another codec."""

import json
from pathlib import Path

import diffusers
import pytest
import safetensors.torch
import torch

from diffusion.codec import drawn
from diffusion.random import Stream, normal
from diffusion.recipe import Recipe, ShardRecipe, TrainRecipe, UNetRecipe
from diffusion.store import codecs
from diffusion.store.codecs import codec, codec_identity, codec_named, identity_for
from tests.small_codec import CHANNELS, FACTOR, VARIABLE, drawing_latents, network, saved

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return saved(tmp_path_factory.mktemp("codec") / "kl")


@pytest.fixture
def copied(folder, tmp_path) -> Path:
    """The folder, to be changed."""
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def pictures(n: int, side: int = 16) -> torch.Tensor:
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


@torch.no_grad()
def test_it_is_diffusers(folder):
    ours, theirs, x = (
        codec("autoencoder-kl", folder=folder),
        diffusers.AutoencoderKL.from_pretrained(folder),
        pictures(3),
    )
    scaling, shift = theirs.config.scaling_factor, theirs.config.shift_factor
    posterior = theirs.encode(x).latent_dist
    latents = ours.encode(x)
    assert latents.shape == (3, 2, CHANNELS, 16 // FACTOR, 16 // FACTOR)
    torch.testing.assert_close(latents[:, 0], (posterior.mean - shift) * scaling, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(latents[:, 1], posterior.std * scaling, rtol=1e-4, atol=1e-5)
    index = torch.arange(3)
    noise = normal(7, Stream.LATENT, index, tuple(posterior.mean.shape[1:]))
    x0 = (posterior.mean + posterior.std * noise - shift) * scaling  # what diffusers' pipelines train on
    torch.testing.assert_close(drawn(latents, seed=7, index=index), x0, rtol=1e-4, atol=1e-5)
    decoded = theirs.decode(x0 / scaling + shift).sample  # and draw from
    torch.testing.assert_close(ours.decode(x0), decoded, rtol=1e-4, atol=1e-5)


def test_a_picture_has_the_bits_that_it_has_alone(folder):
    ours, x = codec("autoencoder-kl", folder=folder), pictures(5)
    latents = ours.encode(x)
    decoded = ours.decode(latents[:, 0])
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for i in (4, 0, 2):
            assert torch.equal(ours.encode(x[i : i + 1])[0], latents[i])
            assert torch.equal(ours.decode(latents[[i, 1], 0])[0], decoded[i])
    finally:
        torch.set_num_threads(threads)


def test_noise_of_a_latent_is_of_its_position_alone(folder):
    latents = codec("autoencoder-kl", folder=folder).encode(pictures(4))
    index = torch.tensor([9, 4, 9, 1])
    whole = drawn(latents, seed=3, index=index)
    assert torch.equal(drawn(latents[1:3], seed=3, index=index[1:3]), whole[1:3])
    assert not torch.equal(drawn(latents, seed=4, index=index), whole)


def test_one_weight_is_another_identity_and_a_model_of_the_former_refuses_it(copied, monkeypatch):
    before = codec_identity("autoencoder-kl", folder=copied)
    assert codec("autoencoder-kl", folder=copied).identity == before
    monkeypatch.setenv(VARIABLE, str(copied))
    assert codec_named(before).identity == before
    weights = safetensors.torch.load_file(copied / WEIGHTS)
    weights["decoder.conv_out.bias"][0] += 1e-3
    safetensors.torch.save_file(weights, copied / WEIGHTS)
    after = codec_identity("autoencoder-kl", folder=copied)
    assert (after.digest != before.digest, after.channels, after.factor) == (True, CHANNELS, FACTOR)
    with pytest.raises(ValueError, match=rf"{before.digest[:12]}.*here is .*{after.digest[:12]}.*Set {VARIABLE}"):
        codec_named(before)


def test_a_file_changed_after_it_was_looked_at_is_not_loaded(copied):
    ours = codec("autoencoder-kl", folder=copied)
    network(seed=1).save_pretrained(copied)
    with pytest.raises(ValueError, match="were changed while they were in use"):
        ours.encode(pictures(1))


def test_names_of_attention_as_they_once_were_are_understood(copied):
    ours = codec("autoencoder-kl", folder=copied).encode(pictures(1))
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = safetensors.torch.load_file(copied / WEIGHTS)
    renamed = {}
    for key, weight in weights.items():
        for new, name in old.items():
            key = key.replace(f".{new}.", f".{name}.") if ".attentions." in key else key
        renamed[key] = weight
    assert renamed.keys() != weights.keys()
    safetensors.torch.save_file(renamed, copied / WEIGHTS)
    assert torch.equal(codec("autoencoder-kl", folder=copied).encode(pictures(1)), ours)


def test_what_cannot_be_used_is_refused_by_name(copied, tmp_path, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(ValueError, match=f"set {VARIABLE} to a folder"):
        codec_identity("autoencoder-kl")
    with pytest.raises(ValueError, match=r"nowhere/config\.json of autoencoder-kl cannot be read \(No such file"):
        codec_identity("autoencoder-kl", folder=tmp_path / "nowhere")
    config = json.loads((copied / "config.json").read_text())
    for changed, match in (
        ({"_class_name": "VQModel"}, "holds VQModel, not AutoencoderKL"),
        ({"in_channels": 1}, "of pictures of 1 channels"),
        ({"latents_mean": [0.0] * 4}, "by its own mean and deviation"),
    ):
        (copied / "config.json").write_text(json.dumps(config | changed))
        with pytest.raises(ValueError, match=match):
            codec_identity("autoencoder-kl", folder=copied)
    (copied / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is no JSON"):
        codec_identity("autoencoder-kl", folder=copied)
    (copied / "config.json").write_text(json.dumps(config))
    weights = safetensors.torch.load_file(copied / WEIGHTS)
    weights.pop("quant_conv.bias")
    safetensors.torch.save_file(weights, copied / WEIGHTS)
    with pytest.raises(ValueError, match=r"does not have the weights .*quant_conv\.bias"):
        codec("autoencoder-kl", folder=copied).encode(pictures(1))
    whole = (copied / WEIGHTS).read_bytes()
    for damaged in (b"pickle", whole[:-1]):  # found without loading them
        (copied / WEIGHTS).write_bytes(damaged)
        with pytest.raises(ValueError, match="is not a safetensors file"):
            codec_identity("autoencoder-kl", folder=copied)
    (copied / WEIGHTS).write_bytes(whole)
    monkeypatch.setattr(codecs, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'diffusion-pipeline\[latents\]'"):
        codec("autoencoder-kl", folder=copied)


def test_a_side_that_the_factor_does_not_divide_is_refused(folder):
    with pytest.raises(ValueError, match=f"must be divisible by {FACTOR}"):
        codec("autoencoder-kl", folder=folder).encode(pictures(1, side=18))


def test_the_recipe_says_the_shape_of_the_latents(folder, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(folder))
    recipe = drawing_latents(TrainRecipe())
    assert identity_for(recipe) == codec_identity("autoencoder-kl", folder=folder)
    assert identity_for(TrainRecipe()) is None
    with pytest.raises(ValueError, match=r"set train\.codec_channels=4 and train\.codec_factor=4"):
        identity_for(drawing_latents(TrainRecipe(), codec_factor=8))


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"codec": "none"}, "codec=none, codec_channels=4"),
        ({"codec_factor": 1}, "codec_factor=1: say what shape"),
        ({"hflip": True}, "not its latents mirrored"),
        ({"degradations": ("colorization",)}, "restoration measures pixels"),
    ],
)
def test_what_does_not_go_with_latents_is_refused(changed, match):
    with pytest.raises(ValueError, match=match):
        drawing_latents(TrainRecipe(), **changed)


def test_sides_are_those_of_the_latents():
    unet = UNetRecipe(channels=16, multipliers=(1, 2), blocks=(1, 1), attention=(4,), stem=2)
    train = drawing_latents(TrainRecipe(), unet=unet.model_dump())
    Recipe(shard=ShardRecipe(resolution=64), train=train)  # 64 / 4 = 16, folded 8, then 4
    with pytest.raises(ValueError, match=r"codec_factor = 16"):
        Recipe(shard=ShardRecipe(resolution=72), train=train)
    with pytest.raises(ValueError, match=r"feature maps have the sides \[4, 2\]"):
        Recipe(
            shard=ShardRecipe(resolution=32),
            train=train.model_copy(
                update={"unet": UNetRecipe(channels=16, multipliers=(1, 2), blocks=(1, 1), attention=(8,))}
            ),
        )


def test_recipes_without_a_codec_are_as_they_were():
    assert not {"codec", "codec_channels", "codec_factor"} & TrainRecipe().model_dump().keys()
