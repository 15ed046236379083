"""What the commands that draw here share: the model, a picture at its size, and what comes back."""

import os
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffusion.adapters.mlflow_registry import resolve as find_model
from diffusion.data.images import encode_png, fit, grid, load, to_model, to_uint8
from diffusion.data.pictures.buckets import Size, nearest, shown
from diffusion.data.sources import MAX_FILE_BYTES
from diffusion.random import Stream
from diffusion.sampler import Conversation, Noise, run
from diffusion.serving.engine import Engine
from diffusion.serving.flight import noise_of, under
from diffusion.serving.receipt import ReworkReceipt, device_name, pixels_sha256, stamp
from diffusion.serving.request import GenerateRequest, ResolvedRequest, parse, resolve
from diffusion.spacing import detailed_sigmas
from diffusion.store.bundle import Bundle, load_bundle
from diffusion.store.bundle_spec import BundleSpec, read_spec
from diffusion.store.publish import sha256_file
from flows.console import progress, say, waiting
from flows.preflight import check_empty
from flows.site import Site

_SLOTS = 16


@dataclass(frozen=True)
class Model:
    """A bundle in an engine, and its names."""

    engine: Engine
    name: str
    version: str

    @property
    def bundle(self) -> Bundle:
        return self.engine.bundle

    def denoise(self, x: Tensor, sigma: Tensor, **cond: Tensor) -> Tensor:
        """D(x; sigma), in the batch sizes that do not show in the picture."""
        return self.engine.denoise(x, sigma, **cond)

    @property
    def device(self) -> torch.device:
        return next(self.bundle.denoiser.parameters()).device

    def size_for(self, image: Image.Image) -> Size:
        return size_for(image, self.bundle.spec)

    def at_size(self, request: GenerateRequest, image: Image.Image) -> GenerateRequest:
        """The request for pictures of the size at which the model works on `image`."""
        return request.model_copy(update={"size": shown(self.size_for(image))})

    def seen(self, x: Tensor) -> Tensor:
        """Pictures (B, 3, R, R) as the network sees them: themselves, or the means of their latents."""
        codec = self.bundle.codec
        return codec.encode(x)[:, 0] if codec else x

    def sigmas(self, steps: int) -> Tensor:
        """The levels of this many steps, down to where a picture's detail lies.  Returns (steps + 1,)."""
        return detailed_sigmas(self.bundle.spec.sampling, steps)

    def noise(self, stream: Stream, request: ResolvedRequest) -> Noise:
        """Step -> noise of the request's pictures."""
        return noise_of(request, stream, range(request.n), self.bundle, self.device)

    def under(self, conversation: Conversation, request: ResolvedRequest, image: Tensor | None = None) -> Conversation:
        """The conversation asked for the request's class and prompt, with its guidance; image: beside x, if the model
        reads one.
        """
        return under(conversation, request, request.n, self.bundle, self.device, image=image)


def size_for(image: Image.Image, spec: BundleSpec) -> Size:
    """(height, width) at which a model works on a picture: of its sizes the one nearest to the picture's shape."""
    return nearest(image.width, image.height, spec.sizes) if spec.sizes else spec.size


def parsed(**options: object) -> GenerateRequest:
    """The options as a request, its seed drawn where none is given.  Raises ValueError naming what is allowed."""
    seed = {"seed": secrets.randbelow(2**32) if options.get("seed") is None else options["seed"]}
    return parse(GenerateRequest, options | seed)


def open_model(
    site: Site, name: str, which: str, bundle: Path | None, check: Callable[[str, BundleSpec], object]
) -> Model:
    """The registered model `name`, or the one in the folder `bundle`.

    check: asked with its name and facts before its weights are loaded, which takes a while; raises ValueError.
    """
    if bundle is None:
        found = find_model(site.tracking(name), name, which, site.store)
        folder, digest, version = found.uri, found.digest, found.version
    else:
        folder, digest, name, version = str(bundle), None, bundle.name, ""
    check(name, read_spec(Path(folder), digest)[0])
    with waiting("loading the model and proving that a picture does not depend on its batch"):
        loaded = load_bundle(folder, "cuda" if site.use_gpu else "cpu", digest=digest)
        engine = Engine(loaded, slots=_SLOTS)
    say(f"  model      {name} {version and 'version ' + version}  {loaded.digest[:16]}")
    return Model(engine, name, version)


def refuse_student(name: str, spec: BundleSpec, what: str) -> None:
    """Raises ValueError for a few-step student, which answers at the levels of its own steps alone.  what: is asked."""
    if spec.lesson:
        raise ValueError(
            f"{name} is a few-step student here, which draws and no more: {what} asks at other noise levels than"
            f" those it was taught for. Give its teacher, `--model VERSION` of bundle {spec.lesson.teacher[:16]}"
        )


def read(path: Path) -> Image.Image:
    """A picture file, upright.  Raises ValueError saying what is wrong with it."""
    if not path.is_file():
        raise ValueError(f"{path} is no file: give a picture, such as a PNG or JPEG")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ValueError(f"{path} has more than {MAX_FILE_BYTES:,} bytes: give a smaller picture")
    try:
        return load(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as a picture: {error}") from error


def fitted(image: Image.Image, size: Size, what: str, *, background: str = "#ffffff") -> np.ndarray:
    """The picture's centred square, or window of another shape, at `size` (height, width), and a line that says so where
    that changed it."""
    height, width = size
    if image.size != (width, height):
        window = "square" if height == width else f"{width}:{height}"
        say(f"  fitted     the centred {window} of the {what}, {image.width} x {image.height}, to {width} x {height}")
    return fit(image, size=size, background=background)


def mask_image(path: Path, picture: Image.Image) -> Image.Image:
    """A mask, of the size of `picture`.  Ask before the model is loaded.  Raises ValueError."""
    image = read(path)
    if image.size != picture.size:
        raise ValueError(
            f"the mask {path} is {image.width} x {image.height}, the picture {picture.width} x {picture.height}: give a"
            f" mask of the picture's size, white where something new is to come"
        )
    return image


def mask_of(mask: Image.Image, size: Size) -> Tensor:
    """What to keep, (3, *size) bool: where the mask is dark or transparent."""
    values = torch.from_numpy(fit(mask, size=size, background="#000000")).float().mean(dim=2)
    keep = values < 128
    if bool(keep.all()):
        raise ValueError("the mask is dark everywhere: nothing would change. White is where something new comes")
    return keep.expand(3, *size)


def in_model(picture: np.ndarray, model: Model) -> Tensor:
    """uint8 (H, W, 3) -> float (1, 3, H, W) in [-1, 1], on the model's device."""
    return to_model(torch.from_numpy(picture)[None]).to(model.device)


def answered(stage: str, converse: Callable[[], Conversation], model: Model) -> Tensor:
    """Hold the conversation with the model, showing how far it is.  Returns x0 (B, C, H, W).

    What a conversation asks does not depend on the answers, so a first one, answered with its own question, tells how long
    the second will be.
    """
    total = done = 0

    def echo(x: Tensor, sigma: Tensor, **cond: Tensor) -> Tensor:
        nonlocal total
        total += len(x)
        return x

    run(converse(), echo)
    with progress(stage, "evaluations") as update:

        def counted(x: Tensor, sigma: Tensor, **cond: Tensor) -> Tensor:
            nonlocal done
            answer = model.denoise(x, sigma, **cond)
            done += len(x)
            update(done, total)
            return answer

        return run(converse(), counted)


def written(
    x0: Tensor, before: Tensor, request: ResolvedRequest, facts: Mapping[str, object], *, out: Path, model: Model
) -> Tensor:
    """Write a PNG for each picture, with its receipt inside, and strip.png: before | after ...  Returns what was written.

    facts: fields of its ReworkReceipt, those of `given_files` among them.  x0 (B, C, H, W), before (1, 3, H, W) in [-1, 1],
    and so is what is returned.
    """
    pictures = list(model.bundle.pictures(x0).numpy())
    out.mkdir(parents=True, exist_ok=True)
    settings = request.model_dump(exclude={"label_index", "n", "size"})
    spec = model.bundle.spec
    settings |= {"model": model.name, "version": model.version, "bundle_digest": model.bundle.digest}
    settings |= {"run_digest": spec.run_digest, "dataset_digest": spec.dataset_digest}
    settings |= {"torch": torch.__version__, "device": device_name(model.device)}
    for i, picture in enumerate(pictures):
        receipt = ReworkReceipt(**facts, **settings, image=i, pixels_sha256=pixels_sha256(picture))
        (out / file_name(request.seed, i)).write_bytes(stamp(picture, receipt))
    strip = [*to_uint8(before.clamp(-1, 1).cpu()).numpy(), *pictures]
    (out / "strip.png").write_bytes(encode_png(grid(strip, len(strip))))
    say(f"  seed       {request.seed}")
    return torch.cat([in_model(picture, model) for picture in pictures])


def file_name(seed: int, image: int) -> str:
    """Of result number `image`."""
    return f"{seed}-{image:03d}.png"


def given_files(picture: Path, mask: Path | None) -> dict[str, str | None]:
    """What receipts say of the files that a picture is made of."""
    return {"given_sha256": sha256_file(picture), "mask_sha256": mask and sha256_file(mask)}


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
