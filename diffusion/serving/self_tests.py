"""What self-tests drew here before: a bundle that draws another picture than it did is not served."""

import json
import logging
import os
import tempfile
from pathlib import Path

import torch

from diffusion.recipe import canonical_json, digest_of
from diffusion.serving.receipt import device_name
from diffusion.serving.ticket import DrawingFailed

_log = logging.getLogger(__name__)


def surroundings(device: torch.device) -> dict[str, str]:
    """All that the bits of a picture may depend on beside the bundle."""
    return {
        "device": device_name(device),
        "processor": _processor(),
        "torch": torch.__version__,
        "threads": str(torch.get_num_threads()),
    }


def check_noted(folder: Path | None, digest: str, device: torch.device, pixels: str) -> None:
    """Hold the sha256 of a self-test's pixels to the one noted of that bundle in these surroundings; note it, where it is
    the first.  folder: of the notes, None for none.  Raises DrawingFailed where they differ.
    """
    if folder is None:
        return
    here = surroundings(device)
    path = folder / f"{digest[:16]}-{digest_of(here)[:16]}.json"
    note = {"bundle_digest": digest, "pixels_sha256": pixels, "surroundings": here}
    known = _read(path)
    if known is None:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
            file.write(canonical_json(note))
        os.replace(file.name, path)
    elif known != pixels:
        raise DrawingFailed(
            f"self-test: the picture has sha256 {pixels[:12]}, and had {known[:12]} when the bundle {digest[:12]} was first"
            f" loaded here. The weights are whole, so something else changed: the processor, a library, the program."
            f" Delete {folder.name}/{path.name} in the home if that is meant"
        )


def _read(path: Path) -> str | None:
    try:
        return str(json.loads(path.read_bytes())["pixels_sha256"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        _log.warning("%s is no note of a self-test: it is written anew", path)
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # another system than Linux
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
