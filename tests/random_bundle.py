"""A bundle whose every weight is random: unlike an untrained network's, its answers depend on all of its input."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import get_args

import safetensors.torch
import torch

from diffusion.degradation import image_channels
from diffusion.denoiser import Denoiser, denoiser_of
from diffusion.recipe import GuidanceKind, SamplingRecipe, TaskName, UNetRecipe, canonical_json
from diffusion.store.averages import Source
from diffusion.store.bundle import Bundle, publish_bundle
from diffusion.store.bundle_spec import BundleSpec, Guide
from diffusion.store.refs import ModelRef
from diffusion.text import TextEncoder
from tests.words import words

CLASSES = ("cat", "dog", "Straße & Co")
UNET = UNetRecipe(channels=32, multipliers=(1, 2), blocks=(1, 1), attention=(8,))
TASKS = get_args(TaskName)
RESOLUTION = 16


def random_denoiser(
    precision: str, seed: int = 0, unet: UNetRecipe = UNET, tasks: tuple[TaskName, ...] = ()
) -> Denoiser:
    """A small denoiser, weights ~ N(0, 1 / fan-in), so that signals keep their size."""
    shape = {"resolution": RESOLUTION, "classes": len(CLASSES), "image_channels": image_channels(tasks)}
    denoiser = denoiser_of(unet, **shape, sigma_data=0.5, precision=precision)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.3
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return denoiser.eval().requires_grad_(False)


def random_spec(precision: str, weights_sha256: str, parameters: int) -> BundleSpec:
    return BundleSpec(
        classes=CLASSES,
        resolution=RESOLUTION,
        unet=UNET,
        sigma_data=0.5,
        precision=precision,
        ema=0.1,
        sampling=SamplingRecipe(sampler="heun", steps=5, guidance=1.5),
        parameters=parameters,
        images_seen=1,
        run_digest="1" * 64,
        dataset_digest="2" * 64,
        recipe_digest="3" * 64,
        weights_sha256=weights_sha256,
    )


def random_bundle(precision: str = "bf16", seed: int = 0) -> Bundle:
    """In memory only; its digest is invented."""
    denoiser = random_denoiser(precision, seed)
    count = sum(parameter.numel() for parameter in denoiser.parameters())
    return Bundle(random_spec(precision, "4" * 64, count), "5" * 64, denoiser)


def guided_bundle(precision: str = "bf16", kind: GuidanceKind = "autoguidance") -> Bundle:
    """The same with a guide, random as well, away from which requests are led that do not say."""
    bundle = random_bundle(precision)
    guide = Guide(checkpoint=Source(images_seen=1, digest="7" * 64), ema=0.05, weights_sha256="8" * 64)
    sampling = bundle.spec.sampling.model_copy(update={"guidance_kind": kind})
    spec = bundle.spec.model_copy(update={"guide": guide, "sampling": sampling})
    return Bundle(spec, "9" * 64, bundle.denoiser, guide=random_denoiser(precision, seed=1))


def reading_spec(precision: str = "bf16", parameters: int = 1, encoder: TextEncoder = words()) -> BundleSpec:
    """The same of a model that reads prompts with this encoder."""
    unet = UNET.model_copy(update={"text_width": encoder.identity.width})
    changed = {"unet": unet, "text": encoder.identity}
    return BundleSpec(**dict(random_spec(precision, "4" * 64, parameters)) | changed)


def reading_bundle(precision: str = "bf16", encoder: TextEncoder = words()) -> Bundle:
    """A random bundle that reads prompts."""
    denoiser = random_denoiser(precision, unet=reading_spec(encoder=encoder).unet)
    count = sum(parameter.numel() for parameter in denoiser.parameters())
    return Bundle(reading_spec(precision, count, encoder), "6" * 64, denoiser, encoder)


def restoring_bundle(tasks: tuple[TaskName, ...] = TASKS) -> Bundle:
    """A random bundle of a model that was trained to restore."""
    denoiser = random_denoiser("fp32", tasks=tasks)
    count = sum(parameter.numel() for parameter in denoiser.parameters())
    spec = random_spec("fp32", "4" * 64, count).model_copy(update={"degradations": tasks})
    return Bundle(spec, "7" * 64, denoiser)


def shaped_bundle(sizes: tuple[tuple[int, int], ...] = ((24, 8), (16, 16), (8, 24))) -> Bundle:
    """The random bundle as of a model that was trained in aspect buckets of these (height, width)."""
    bundle = random_bundle()
    return replace(bundle, spec=bundle.spec.model_copy(update={"sizes": sizes}))


def published_model(store_root: Path, *, seed: int = 0, version: str = "1", bundle: Bundle | None = None) -> ModelRef:
    """A random bundle, or that one, published below `store_root`, as a registered version would refer to it."""
    bundle = bundle or random_bundle(seed=seed)
    spec, folder = bundle.spec, store_root / f"staged-{seed}"
    folder.mkdir(parents=True)
    sha256 = _written(bundle.denoiser, folder / "weights.safetensors")
    spec = spec.model_copy(update={"weights_sha256": sha256})
    if bundle.guide is not None:
        guide = {"weights_sha256": _written(bundle.guide, folder / "guide.safetensors")}
        spec = spec.model_copy(update={"guide": spec.guide.model_copy(update=guide)})
    (folder / "bundle.json").write_bytes(canonical_json(spec))
    uri, digest = publish_bundle(folder, store_root)
    return ModelRef(
        uri=uri,
        digest=digest,
        name="tiny",
        version=version,
        aliases=("champion",),
        run_digest=spec.run_digest,
        dataset_digest=spec.dataset_digest,
    )


def _written(denoiser: Denoiser, path: Path) -> str:
    """Write its weights.  Returns their sha256."""
    data = safetensors.torch.save({name: parameter.contiguous() for name, parameter in denoiser.named_parameters()})
    path.write_bytes(data)
    return hashlib.sha256(data).hexdigest()
