"""Finding, verifying and loading the weights of codecs: diffusers' `AutoencoderKL` from a site's folder.

No pickle is read and nothing is fetched.  diffusers is imported when a network is built, and that is when it is asked for
the first latent or picture: who finds all latents precomputed never pays for it.
"""

import json
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from diffusion.codec import Codec, CodecIdentity
from diffusion.recipe import TrainRecipe, digest_of
from diffusion.store.publish import read_checked, sha256_file
from diffusion.store.site_folders import site_folder

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

CodecName = Literal["autoencoder-kl"]

FOLDERS = {"autoencoder-kl": "DIFFUSION_CODEC_AUTOENCODER_KL"}  # environment variables
PACKAGES = {"autoencoder-kl": ("diffusers",)}  # what a codec needs beside torch and safetensors
_CONFIG, _WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
_HOLDS = f"{_CONFIG} and {_WEIGHTS}, as diffusers' `AutoencoderKL.save_pretrained` writes them"
_SCALING = 0.18215  # of folders written before configurations had it  [Rombach et al. 2022, Sec. G]
_RENAMED = {
    "query": "to_q",
    "key": "to_k",
    "value": "to_v",
    "proj_attn": "to_out.0",
}  # in folders of diffusers before 0.18


def codec(name: CodecName, *, folder: Path | None = None, device: str = "cpu") -> Codec:
    """The codec of that name.  folder: with its files; without it, see `find_folder`.  Raises ValueError."""
    identity, files = _read(name, Path(folder or find_folder(name)))
    if find_spec("diffusers") is None:
        raise ValueError(
            f"the codec {name} needs the package diffusers, which is not installed:"
            " `pip install 'diffusion-pipeline[latents]'`"
        )

    @cache
    def network() -> "AutoencoderKL":
        return _network(files).to(device)

    def moments(x: Tensor) -> Tensor:
        found = network().encode(x).latent_dist
        return torch.stack([found.mean, found.std], dim=1)

    return Codec(identity, moments, lambda z: network().decode(z).sample, device)


def codec_identity(name: CodecName, *, folder: Path | None = None) -> CodecIdentity:
    """`codec(...).identity`, from the codec's files alone: no weights are loaded, diffusers need not be there."""
    return _read(name, Path(folder or find_folder(name)))[0]


def identity_for(recipe: TrainRecipe) -> CodecIdentity | None:
    """The identity of what makes latents of a run's pictures, None where nothing does.  Raises ValueError where the codec
    found here makes others than the recipe says."""
    if recipe.codec == "none":
        return None
    identity = codec_identity(recipe.codec)
    if (identity.channels, identity.factor) != (recipe.codec_channels, recipe.codec_factor):
        raise ValueError(
            f"train.codec_channels={recipe.codec_channels} and train.codec_factor={recipe.codec_factor}, and this"
            f" {recipe.codec} makes latents of {identity.channels} channels, {identity.factor} times smaller than the"
            f" picture: set train.codec_channels={identity.channels} and train.codec_factor={identity.factor}"
        )
    return identity


def codec_named(identity: CodecIdentity, device: str = "cpu") -> Codec:
    """The codec of a model, a dataset's latents or a run.  Raises ValueError where the one found here is another."""
    found = codec(identity.name, device=device)
    if found.identity != identity:
        raise ValueError(
            f"wanted is the codec {identity}, with whose latents the model was trained, and here is {found.identity}: it"
            f" would make other pictures of the same latents. Set {FOLDERS[identity.name]} to a folder with that codec"
        )
    return found


def find_folder(name: CodecName) -> Path:
    """The local folder that the site's environment variable DIFFUSION_CODEC_AUTOENCODER_KL names.  Raises ValueError."""
    if name not in FOLDERS:
        raise ValueError(f"codec {name!r} is unknown: choose one of {', '.join(FOLDERS)}")
    return site_folder(FOLDERS, name, _HOLDS)


def _read(name: CodecName, folder: Path) -> tuple[CodecIdentity, dict[Path, str]]:
    """The identity of the codec in a folder, and its files with their sha256."""
    try:
        files = {folder / file: sha256_file(folder / file) for file in (_CONFIG, _WEIGHTS)}
        config = json.loads((folder / _CONFIG).read_bytes())
    except OSError as error:
        raise ValueError(
            f"{error.filename} of {name} cannot be read ({error.strerror}): {FOLDERS[name]} is a folder with {_HOLDS}"
        ) from error
    except ValueError as error:
        raise ValueError(f"{folder / _CONFIG} of {name} is no JSON: {error}. Copy it again") from error
    if not isinstance(config, dict) or config.get("_class_name") != "AutoencoderKL":
        found = config.get("_class_name") if isinstance(config, dict) else None
        raise ValueError(f"{folder} holds {found or 'no model of diffusers'}, not AutoencoderKL: name another folder")
    if (channels := (config.get("in_channels", 3), config.get("out_channels", 3))) != (3, 3):
        raise ValueError(f"{folder}: this AutoencoderKL is of pictures of {channels[0]} channels, and ours have 3")
    if config.get("latents_mean") or config.get("latents_std"):
        raise ValueError(
            f"{folder}: this AutoencoderKL scales each channel of its latents by its own mean and deviation, which is not"
            " supported: name another folder"
        )
    try:
        with safe_open(folder / _WEIGHTS, "pt"):  # its beginning and its length
            pass
    except SafetensorError as error:
        raise ValueError(f"{folder / _WEIGHTS} is not a safetensors file: {error}. Copy it again") from error
    identity = CodecIdentity(
        name=name,
        digest=digest_of({path.name: digest for path, digest in files.items()}),
        channels=config.get("latent_channels", 4),
        factor=2 ** (len(config.get("block_out_channels", (64,))) - 1),
        scaling=config.get("scaling_factor") or _SCALING,
        shift=config.get("shift_factor") or 0.0,
    )
    return identity, files


def _network(files: dict[Path, str]) -> "AutoencoderKL":
    """The network of these files, hashed and parsed from the same bytes, in float32 and eval mode, without gradients."""
    from diffusers import AutoencoderKL

    why = "The codec's files were changed while they were in use: start again"
    config, weights = (read_checked(path, digest, why) for path, digest in files.items())
    where = next(reversed(files))
    found = safetensors.torch.load(weights)
    with torch.random.fork_rng(devices=[]):  # its constructor draws weights, which are not used
        network = AutoencoderKL.from_config(json.loads(config))
    try:
        network.load_state_dict({_renamed(key): weight for key, weight in found.items()})
    except RuntimeError as error:
        first = " ".join(str(error).split())[:300]
        raise ValueError(f"{where} does not have the weights that {_CONFIG} speaks of: {first}") from error
    return network.eval().requires_grad_(False)


def _renamed(key: str) -> str:
    """The present name of a weight: those of attention were others once."""
    before, _, last = key.rpartition(".")
    parent, _, name = before.rpartition(".")
    return f"{parent}.{_RENAMED[name]}.{last}" if ".attentions." in key and name in _RENAMED else key
