"""The bundle: all that serving needs and nothing else.  Averaged weights as safetensors, and bundle.json, whose sha256
is the model's digest.  There is no pickle in it, and no raw weights."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from diffusion.codec import Codec
from diffusion.data.images import to_uint8
from diffusion.degradation import image_channels
from diffusion.denoiser import Denoiser, denoiser_of
from diffusion.ema import Snapshot
from diffusion.recipe import SamplingRecipe, canonical_json
from diffusion.store.averages import Average, read_average, read_recipe
from diffusion.store.bundle_spec import (
    AGAIN,
    GUIDE_NAME,
    SPEC_NAME,
    WEIGHTS_NAME,
    BundleSpec,
    Guide,
    bundle_path,
    read_spec,
)
from diffusion.store.codecs import codec_named
from diffusion.store.publish import publish, room_in, sha256_file, staging
from diffusion.store.refs import RunRef
from diffusion.store.text_encoders import encoder_named
from diffusion.text import TextEncoder


@dataclass(frozen=True)
class Bundle:
    """A verified bundle in memory.  Its denoisers are in eval mode and ask for no gradients."""

    spec: BundleSpec
    digest: str
    denoiser: Denoiser
    encoder: TextEncoder | None = None  # of spec.text
    guide: Denoiser | None = None  # of spec.guide
    codec: Codec | None = None  # of spec.codec

    def pictures(self, x0: Tensor) -> Tensor:
        """What was drawn, (B, C, H, W) -> uint8 (B, H, W, 3), each picture with the bits it would have alone.

        Raises ValueError where a value is not finite.
        """
        return to_uint8((self.codec.decode(x0) if self.codec else x0).cpu())


def export_bundle(
    run: RunRef, ema_sigma_rel: float, store_root: Path, sampling: SamplingRecipe, guide: Snapshot | None = None
) -> tuple[str, str]:
    """Publish the bundle of one average of a finished run, with that of `guide` beside it.  Returns (folder, digest).

    The same run, averages and sampling give the same bytes.  Raises ValueError for a checkpoint that is damaged, or not
    this run's, or an average that `read_average` cannot give: raw weights are never served.
    """
    recipe, text, codec = read_recipe(run)
    model = read_average(run, Snapshot(run.images_seen, ema_sigma_rel))
    data = {WEIGHTS_NAME: _packed(model)}
    second = None
    if guide is not None:
        worse = read_average(run, guide)
        data[GUIDE_NAME] = _packed(worse)
        second = Guide(
            checkpoint=worse.checkpoint,
            ema=guide.sigma_rel,
            reconstruction=worse.reconstruction,
            weights_sha256=hashlib.sha256(data[GUIDE_NAME]).hexdigest(),
        )
    spec = BundleSpec(
        classes=run.dataset.classes,
        resolution=run.dataset.resolution,
        sizes=run.dataset.sizes,
        unet=recipe.unet,
        text=text,
        codec=codec,
        degradations=recipe.degradations,
        sigma_data=recipe.sigma_data,
        prediction=recipe.prediction,
        precision=recipe.precision,
        lesson=recipe.lesson,
        ema=ema_sigma_rel,
        reconstruction=model.reconstruction,
        guide=second,
        sampling=sampling,
        parameters=sum(weight.numel() for weight in model.weights.values()),
        images_seen=run.images_seen,
        init=recipe.init,
        run_digest=run.digest,
        dataset_digest=run.dataset.digest,
        recipe_digest=run.recipe_digest,
        weights_sha256=hashlib.sha256(data[WEIGHTS_NAME]).hexdigest(),
    )
    bundles = Path(store_root) / "bundles"
    with room_in(bundles, "the weights of the model"), staging(bundles) as folder:
        for name, content in data.items():
            _network(spec, content, source=run.uri)
            (folder / name).write_bytes(content)
        (folder / SPEC_NAME).write_bytes(canonical_json(spec))
        return publish_bundle(folder, store_root)


def publish_bundle(folder: Path, store_root: Path) -> tuple[str, str]:
    """Verify the bundle in `folder`, a temporary one on the store's disk, and move it to its place in the store.

    Where that bundle is published already, it is verified instead.  Returns (folder, digest).
    """
    _, digest = verify_bundle(folder)
    final = bundle_path(store_root, digest)
    try:
        publish(folder, final)
    except FileExistsError:
        verify_bundle(final, digest)
    return str(final), digest


def verify_bundle(uri: str | Path, digest: str | None = None) -> tuple[BundleSpec, str]:
    """Check bundle.json and the weights against their digests without loading them.  Returns (spec, digest).

    digest: the one it must have, if known.  Raises ValueError saying which file is missing or wrong.
    """
    spec, actual = read_spec(Path(uri), digest)
    for name, expected in spec.weights.items():
        _check_weights(Path(uri, name), expected, sha256_file(Path(uri, name)))
    return spec, actual


def load_bundle(uri: str | Path, device: str | torch.device = "cpu", *, digest: str | None = None) -> Bundle:
    """Read a bundle, verifying it as `verify_bundle` does, and put its denoisers, its text encoder and its codec on
    `device`.

    Raises ValueError where that encoder or codec is not installed here, or another is.
    """
    spec, actual = read_spec(Path(uri), digest)
    denoisers = [_read_network(spec, Path(uri, name)).to(device) for name in spec.weights]
    encoder = encoder_named(spec.text, str(device)) if spec.text else None
    codec = codec_named(spec.codec, str(device)) if spec.codec else None
    return Bundle(spec, actual, denoisers[0], encoder, *denoisers[1:], codec=codec)


def load_model(uri: str | Path, *, digest: str | None = None) -> tuple[BundleSpec, Denoiser]:
    """Of a bundle, verified, the specification and the model alone, on the CPU: what reads its captions or makes its latents
    need not be installed."""
    spec, _ = read_spec(Path(uri), digest)
    return spec, _read_network(spec, Path(uri, WEIGHTS_NAME))


def _read_network(spec: BundleSpec, path: Path) -> Denoiser:
    data = path.read_bytes()  # hashed and parsed from the same bytes: nothing can change between
    _check_weights(path, spec.weights[path.name], hashlib.sha256(data).hexdigest())
    return _network(spec, data, source=str(path)).eval().requires_grad_(False)


def _check_weights(path: Path, expected: str, actual: str) -> None:
    if actual != expected:
        raise ValueError(
            f"{path}: sha256 {actual[:12]}, {SPEC_NAME} says {expected[:12]}. A published bundle never"
            f" changes, so this copy is damaged. {AGAIN}"
        )


def _packed(average: Average) -> bytes:
    # contiguous: the file knows no memory formats, and equal weights are to give equal bytes
    return safetensors.torch.save({name: weight.float().contiguous() for name, weight in average.weights.items()})


def _network(spec: BundleSpec, data: bytes, *, source: str) -> Denoiser:
    """The denoiser of the specification with these weights, a safetensors file's bytes."""
    channels, side, _ = spec.shape_at((spec.resolution, spec.resolution))
    denoiser = denoiser_of(
        spec.unet,
        resolution=side,
        channels=channels,
        classes=len(spec.classes),
        sigma_data=spec.sigma_data,
        precision=spec.precision,
        prediction=spec.prediction,
        image_channels=image_channels(spec.degradations),
    )
    try:
        weights = safetensors.torch.load(data)
    except SafetensorError as error:
        raise ValueError(f"{source} is not a safetensors file: {error}. Export the bundle again.") from error
    _fill(denoiser, weights, source=source)
    return denoiser


@torch.no_grad()
def _fill(denoiser: Denoiser, weights: dict[str, Tensor], *, source: str) -> None:
    """Copy weights by name into the denoiser's parameters: all of them, no others, of equal shape."""
    parameters = dict(denoiser.named_parameters())
    wrong = sorted(parameters.keys() ^ weights.keys()) or [
        name for name, p in parameters.items() if p.shape != weights[name].shape
    ]
    if wrong:
        raise ValueError(f"{source}: weights and U-Net recipe differ in {len(wrong)} tensors, first {wrong[:3]}")
    for name, parameter in parameters.items():
        parameter.copy_(weights[name])
