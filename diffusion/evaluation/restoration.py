"""Restoring pictures that a model never saw - enlarged, filled in, coloured - as `diffusion restore` does it, and how near
they come to the true ones.

Each picture is measured (made small, cut open, grey) and restored under its own class and caption, without guidance: in the
trained way where the model learned the task, zero-shot elsewhere.  Beside it stands what one does without a model.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion.data.images import to_uint8
from diffusion.data.pictures.buckets import Size
from diffusion.degradation import FACTORS, beside
from diffusion.evaluation.metrics.fidelity import psnr, ssim
from diffusion.guidance import MODEL, Cond, conditioned
from diffusion.operators import BlockMean, Grey, LinearOperator, Mask
from diffusion.random import Stream, normal
from diffusion.recipe import TaskName
from diffusion.restore import TRAINED_STEPS, null_space, residual, zero_shot
from diffusion.sampler import SAMPLERS, run
from diffusion.serving.engine import Engine
from diffusion.spacing import detailed_sigmas
from diffusion.store.bundle_spec import BundleSpec

SHOWN = 8  # pictures in the grid
EXACT = 100.0  # dB that a picture counts which equals the truth: its PSNR is infinite
_SMALLEST = 11  # side at which there is an SSIM
_COLORIZATION = "colorization"


class Case(NamedTuple):
    """One task of restoration on pictures of one size."""

    name: str
    task: TaskName
    operator: LinearOperator
    guessed: str  # what one does without a model, in a word
    guess: Callable[[Tensor], Tensor]  # that: y -> x0
    given: Callable[[Tensor], Tensor]  # y as a picture to look at


def cases_for(spec: BundleSpec) -> tuple[str, ...]:
    """Names of the tasks that a model can be asked for: none of a student, which draws and no more, or of one that draws
    latents."""
    if spec.lesson or spec.codec:
        return ()
    sides = [side for size in (spec.sizes or (spec.size,)) for side in size]
    factors = [factor for factor in FACTORS if not any(side % factor for side in sides)]
    return (*(f"super-resolution x{factor}" for factor in factors), "inpainting", _COLORIZATION)


def case_of(name: str, size: Size) -> Case:
    """A task on pictures of (height, width).  Inpainting's hole is the middle quarter."""
    if name == "inpainting":
        height, width = size
        keep = torch.ones(3, height, width, dtype=torch.bool)
        keep[:, height // 4 : 3 * height // 4, width // 4 : 3 * width // 4] = False
        hole = Mask(keep)
        return Case(name, "inpainting", hole, "grey", hole.pinv, hole.pinv)
    if name == _COLORIZATION:
        grey = partial(Tensor.expand, size=(-1, 3, -1, -1))
        return Case(name, "colorization", Grey(), "grey", grey, grey)
    blocks = BlockMean(int(name.removeprefix("super-resolution x")))
    bicubic = partial(F.interpolate, scale_factor=blocks.factor, mode="bicubic")
    return Case(name, "super-resolution", blocks, "bicubic", bicubic, blocks.pinv)


def restored(engine: Engine, case: Case, x0: Tensor, cond: Cond, picture: Tensor, *, seed: int) -> dict[str, Tensor]:
    """Pictures x0 (N, 3, H, W) with numbers `picture` (N,), measured and restored.

    Returns {"restored", "guess", "given"}, (N, 3, H, W) in about [-1, 1] on the engine's device, and {"y"}.  Noise is a
    function of the seed and the picture's number, and each picture has the bits that it would have alone.
    """
    spec, device = engine.bundle.spec, engine.device
    x0, cond = x0.to(device), {name: value.to(device) for name, value in cond.items()}
    y = case.operator.forward(x0)
    sigmas = detailed_sigmas(spec.sampling, steps_of(case.task, spec))

    def noise(step: int, stream: Stream = Stream.CHURN) -> Tensor:
        drawn = [normal(seed, stream, torch.tensor([(step << 32) + i]), tuple(x0.shape[1:])) for i in picture.tolist()]
        return torch.cat(drawn).to(device)

    x = noise(0, Stream.INITIAL) * sigmas[0].float()
    if case.task in spec.degradations:
        way = null_space(SAMPLERS[spec.sampling.sampler](x, sigmas, noise), case.operator, y)
        cond = {**cond, "image": beside(case.operator, case.operator.pinv(y))}
    else:
        way = zero_shot(x, sigmas, noise, case.operator, y)
    if engine.bundle.guide is not None:
        cond = {**cond, MODEL: torch.zeros(len(x0), dtype=torch.int64, device=device)}
    with torch.no_grad():
        answer = run(conditioned(way, cond), engine.denoise)
    return {"restored": answer, "guess": case.guess(y), "given": case.given(y), "y": y}


def fidelity(
    case: Case, made: Mapping[str, Tensor], x0: Tensor, features: Callable[[np.ndarray], np.ndarray]
) -> dict[str, np.ndarray]:
    """How near what was `restored` is to x0 (N, 3, H, W), and to its y: {"psnr", "ssim", "distance", "consistency"}, float64
    (N,), the first three after rounding to 8 bits; and the same of the guess, {"guess_psnr", ...}.  NaN where a picture is
    not finite, or too small for an SSIM.

    features: uint8 (M, H, W, 3) -> (M, D), asked once.
    """
    true, found = to_uint8(x0.cpu()), {}
    pictures = {name: to_uint8(made[name].nan_to_num().cpu()) for name in ("restored", "guess")}
    of_true, *of_others = np.split(features(np.concatenate([true, *pictures.values()])), 3)
    nothing = torch.full((len(x0),), math.nan).double()
    for prefix, (name, own), there in zip(("", "guess_"), pictures.items(), of_others, strict=True):
        values = {
            "psnr": psnr(own, true).clamp(max=EXACT),
            "ssim": nothing if min(true.shape[1:3]) < _SMALLEST else ssim(own, true),
            "distance": torch.from_numpy(there - of_true).double().norm(dim=1),
            "consistency": residual(case.operator, made[name], made["y"]).double().cpu(),
        }
        finite = made[name].isfinite().flatten(1).all(dim=1).cpu()
        found |= {f"{prefix}{name}": torch.where(finite, each, nothing).numpy() for name, each in values.items()}
    return found


def steps_of(task: TaskName, spec: BundleSpec) -> int:
    """Of the way that is gone."""
    return TRAINED_STEPS if task in spec.degradations else spec.sampling.steps
