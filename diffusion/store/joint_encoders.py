"""Encoders of pictures and captions into one space, from a site's folder: CLIP, as transformers writes it.

No pickle is read and nothing is fetched.  transformers is imported when it is asked for.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from diffusion.recipe import Frozen, digest_of
from diffusion.store.publish import sha256_file
from diffusion.store.site_folders import site_folder
from diffusion.threads import one_thread

FOLDERS = {"clip": "DIFFUSION_JOINT_CLIP"}  # environment variables
_READ = (".safetensors", ".json", ".txt", ".model")  # what of a folder can change a number


class JointIdentity(Frozen):
    """What must be equal for pictures and captions to become the same numbers."""

    name: str
    digest: str  # sha256 of the names and sha256 of the files
    resolution: int  # side in pixels that the network sees
    precision: str = "float32"


@dataclass(frozen=True)
class JointEncoder:
    """Both halves.  Embeddings are of norm 1, so that the product of two is the cosine of their angle."""

    identity: JointIdentity
    network: Callable[[Tensor], Tensor]  # float32 (B, 3, R, R) in [0, 255] -> (B, E)
    read: Callable[[str], Tensor]  # a caption -> (E,)
    device: str = "cpu"

    @torch.no_grad()
    @one_thread()
    def captions(self, captions: Sequence[str]) -> Tensor:
        """(B, E) float32: each read alone, so of the same bits beside any others."""
        return torch.nn.functional.normalize(torch.stack([self.read(caption) for caption in captions]), dim=1).cpu()


def joint_encoder(device: str = "cpu", folder: Path | None = None) -> JointEncoder:
    """The CLIP of a folder, by default that of DIFFUSION_JOINT_CLIP.  Raises ValueError saying what is missing."""
    folder = folder or find_folder()
    identity = joint_identity(folder)
    import transformers

    try:
        # a pickle is never read, and weights the folder lacks are never made up
        model, found = transformers.CLIPModel.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except OSError as error:
        raise ValueError(f"{folder}: the files of clip cannot be read: {error}") from error
    if found["missing_keys"]:
        raise ValueError(f"{folder} lacks weights of clip: {sorted(found['missing_keys'])[:3]}. Copy it again")
    model = model.to(device).eval().requires_grad_(False)
    facts = _json(folder, "preprocessor_config.json")
    mean, std = (torch.tensor(facts[name], device=device).view(3, 1, 1) for name in ("image_mean", "image_std"))
    most = model.config.text_config.max_position_embeddings

    def network(x: Tensor) -> Tensor:
        seen = model.vision_model(pixel_values=(x / 255 - mean) / std)
        return model.visual_projection(seen.pooler_output)

    def read(caption: str) -> Tensor:
        ids = tokenizer(caption, truncation=True, max_length=most)["input_ids"]
        said = model.text_model(input_ids=torch.tensor([ids], device=device))
        return model.text_projection(said.pooler_output)[0]

    return JointEncoder(identity, network, read, device)


def joint_identity(folder: Path | None = None) -> JointIdentity:
    """`joint_encoder(...).identity`, from the files alone: no weights are loaded."""
    folder = folder or find_folder()
    config = _json(folder, "config.json")
    if config.get("model_type") != "clip" or "vision_config" not in config:
        raise ValueError(
            f"{folder} holds a {config.get('model_type')} model, not the whole of CLIP, pictures' half and captions' half:"
            f" name another folder in {FOLDERS['clip']}"
        )
    try:
        import transformers  # noqa: F401
    except ModuleNotFoundError as error:
        raise ValueError(
            "CLIP needs the package transformers, which is not installed:"
            " `pip install 'diffusion-pipeline[text-transformers]'`"
        ) from error
    files = sorted(path for path in folder.iterdir() if path.suffix in _READ)
    digest = digest_of({path.name: sha256_file(path) for path in files})
    return JointIdentity(name="clip", digest=digest, resolution=config["vision_config"].get("image_size", 224))


def find_folder() -> Path:
    """The folder that DIFFUSION_JOINT_CLIP names.  Raises ValueError where it names none."""
    return site_folder(
        FOLDERS,
        "clip",
        "config.json, model.safetensors, preprocessor_config.json and the tokenizer's files, as transformers'"
        " `save_pretrained` writes them; or use `--set evaluate.joint=none`",
    )


def _json(folder: Path, name: str) -> dict:
    try:
        return json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder / name} cannot be read ({error}): copy the folder of CLIP again") from error
