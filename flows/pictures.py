"""What the commands that draw here share: the model, the files that are given, and where results go."""

import os
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from diffusion.adapters.mlflow_registry import resolve as find_model
from diffusion.data.images import encode_png, grid, to_model, to_uint8
from diffusion.data.sources import MAX_FILE_BYTES
from diffusion.serving.engine import Engine
from diffusion.serving.given import Given
from diffusion.serving.receipt import stamp
from diffusion.serving.request import Asked, GenerateRequest, ResolvedRequest, parse, resolve
from diffusion.serving.rework import Rework, receipts
from diffusion.store.bundle import Bundle, load_bundle
from diffusion.store.bundle_spec import BundleSpec, read_spec
from flows.console import progress, say, waiting
from flows.preflight import check_empty
from flows.site import Site

_SLOTS = 16
Request = TypeVar("Request", bound=Asked)


@dataclass(frozen=True)
class Model:
    """A bundle in an engine, and its names."""

    engine: Engine
    name: str
    version: str

    @property
    def bundle(self) -> Bundle:
        return self.engine.bundle

    @property
    def device(self) -> torch.device:
        return self.engine.device


def parsed(kind: type[Request] = GenerateRequest, **options: object) -> Request:
    """The options as a request, its seed drawn where none is given.  Raises ValueError naming what is allowed."""
    given = {name: value for name, value in options.items() if value is not None}
    return parse(kind, {"seed": secrets.randbelow(2**32)} | given)


def open_model(site: Site, name: str, which: str, bundle: Path | None, check: Callable[[BundleSpec], object]) -> Model:
    """The registered model `name`, or the one in the folder `bundle`.

    check: asked with its facts before its weights are loaded, which takes a while; raises ValueError.
    """
    if bundle is None:
        found = find_model(site.tracking(name), name, which, site.store)
        folder, digest, version = found.uri, found.digest, found.version
    else:
        folder, digest, name, version = str(bundle), None, bundle.name, ""
    check(read_spec(Path(folder), digest)[0])
    with waiting("loading the model and proving that a picture does not depend on its batch"):
        loaded = load_bundle(folder, "cuda" if site.use_gpu else "cpu", digest=digest)
        engine = Engine(loaded, slots=_SLOTS)
    say(f"  model      {name} {version and 'version ' + version}  {loaded.digest[:16]}")
    return Model(engine, name, version)


def read(path: Path, param: str = "picture") -> Given:
    """A picture file, upright.  param: what the request calls it.  Raises ValueError saying what is wrong with it."""
    if not path.is_file():
        raise ValueError(f"{path} is no file: give a picture, such as a PNG or JPEG")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ValueError(f"{path} has more than {MAX_FILE_BYTES:,} bytes: give a smaller picture")
    return Given.of(path.read_bytes(), param)


def reworked(stage: str, rework: Rework, model: Model, out: Path) -> tuple[Tensor, list[float]]:
    """Draw it, showing how far it is, and write a PNG for each result, with its receipt inside, and strip.png: before |
    after ...  Returns what was written, (N, 3, H, W) in [-1, 1], and of each how far it was `off`, where that is known."""
    for note in rework.notes:
        say(f"  fitted     {note}")
    with progress(stage, "evaluations") as update:
        (ticket,) = model.engine.draw([rework.job], update)
    pictures = ticket.future.result()
    out.mkdir(parents=True, exist_ok=True)
    identity = {"model": model.name, "version": model.version, "device": model.device}
    for picture, receipt in zip(pictures, receipts(rework, pictures, model.bundle, **identity), strict=True):
        (out / file_name(receipt.seed, receipt.image)).write_bytes(stamp(picture, receipt))
    strip = [*to_uint8(rework.before.clamp(-1, 1).cpu()).numpy(), *pictures]
    (out / "strip.png").write_bytes(encode_png(grid(strip, len(strip))))
    say(f"  seed       {rework.job.request.seed}")
    written = to_model(torch.from_numpy(np.stack(pictures))).to(model.device)
    return written, [ticket.off[i] for i in sorted(ticket.off)]


def file_name(seed: int, image: int) -> str:
    """Of result number `image`."""
    return f"{seed}-{image:03d}.png"


def folder(site: Site, out: Path | None, kind: str, name: str) -> Path:
    """Where the results go: `out`, or a new folder in the home.  Ask before the work: it is refused if it cannot be made,
    and if it has files in it, which might be the user's only ones.
    """
    new = f"{name[:100]}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"  # two commands may start in one second
    target = (out or site.home / kind / new).absolute()
    check_empty(target)
    return target


def settled(request: GenerateRequest, model: Model) -> ResolvedRequest:
    """The request with the model's own settings for what it leaves open."""
    return resolve(request, model.bundle.spec)
