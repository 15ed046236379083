"""How well a model restores pictures it never saw: `python -m tests.benchmarks.bench_restoration`, after `make demo`.

Every held-out picture is made small, cut open or grey, and restored as `diffusion restore` does it, under its own class.
Beside it stand the ways without a model.  PSNR is the median over the pictures (a grey picture made grey is exact, its PSNR
infinite), SSIM and the distance of the features are means, ||A x - y|| is the largest root mean square, before rounding to
8 bits.  The figure has the measurement, the restored and the true pictures in rows.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion.adapters.mlflow_registry import resolve
from diffusion.data.images import encode_png, grid, to_model, to_uint8
from diffusion.data.stream import ShardReader
from diffusion.evaluation.features import extractor
from diffusion.evaluation.fidelity import psnr, ssim
from diffusion.guidance import conditioned
from diffusion.operators import BlockMean, Composition, Grey, LinearOperator, Mask
from diffusion.random import Stream, normal
from diffusion.restore import ddnm_plus, residual, time_travel
from diffusion.sampler import run
from diffusion.schedule import karras_sigmas
from diffusion.store.bundle import Bundle, load_bundle
from flows.pictures import DETAIL
from flows.restore import STRETCH
from flows.site import Site

BATCH = 16
SHOWN = 12


class Case(NamedTuple):
    name: str
    operator: LinearOperator
    baselines: dict[str, Callable[[Tensor], Tensor]]  # y -> x0


def cases(side: int) -> list[Case]:
    """The measurements, each with what one does without a model."""
    keep = torch.ones(3, side, side, dtype=torch.bool)
    keep[:, side // 4 : 3 * side // 4, side // 4 : 3 * side // 4] = False
    hole, grey = Mask(keep), Grey()
    result = [
        Case(
            f"super-resolution x{factor}",
            BlockMean(factor),
            {"nearest": BlockMean(factor).pinv, "bicubic": partial(F.interpolate, scale_factor=factor, mode="bicubic")},
        )
        for factor in (2, 4, 8)
    ]
    small_grey = Composition(BlockMean(4), grey)
    return [
        *result,
        Case("inpainting", hole, {"grey": hole.pinv, "white": lambda y: torch.where(keep, hole.pinv(y), 1.0)}),
        Case("colorization", grey, {"grey": lambda y: y.expand(-1, 3, -1, -1)}),
        Case("colorization x4", small_grey, {"nearest": lambda y: BlockMean(4).pinv(y).expand(-1, 3, -1, -1)}),
    ]


def restored(bundle: Bundle, operator: LinearOperator, y: Tensor, label: Tensor, steps: int, repeats: int) -> Tensor:
    """x0 of all measurements; the noise is a function of the picture's number."""
    recipe, shape = bundle.spec.sampling, (3, bundle.spec.resolution, bundle.spec.resolution)
    sigmas = karras_sigmas(steps, sigma_min=DETAIL, sigma_max=recipe.sigma_max, rho=recipe.rho)
    parts = []
    for rows in torch.arange(len(y)).split(BATCH):

        def noise(step: int, rows: Tensor = rows, stream: Stream = Stream.CHURN) -> Tensor:
            return normal(0, stream, (step << 32) + rows, shape)

        def solver(x: Tensor, sigmas: Tensor, noise: Callable[[int], Tensor], rows: Tensor = rows):
            return ddnm_plus(x, sigmas, noise, operator, y[rows], sigma_y=0.0)

        x = noise(0, stream=Stream.INITIAL) * sigmas[0].float()
        conversation = time_travel(solver, x, sigmas, noise, length=STRETCH, repeats=repeats)
        parts.append(run(conditioned(conversation, {"label": label[rows]}), bundle.denoiser))
    return torch.cat(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, default=Path(".diffusion"))
    parser.add_argument("--name", default="demo", help="registered model")
    parser.add_argument("--model", default="champion", help="alias or version")
    parser.add_argument("--pictures", type=int, default=200)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--figure", type=Path, default=Path("restoration.png"))
    options = parser.parse_args()
    site = Site(home=options.home)
    site.prepare()
    model = resolve(site.tracking(options.name), options.name, options.model, site.store)
    bundle = load_bundle(model.uri, digest=model.digest)
    dataset = site.store / "datasets" / model.dataset_digest[:16]
    reader = ShardReader(dataset, "holdout", digest=model.dataset_digest)
    chosen = torch.arange(min(options.pictures, len(reader))).numpy()
    truth = torch.from_numpy(reader.gather(chosen)[0])
    x0, label = to_model(truth), torch.from_numpy(reader.labels[chosen])
    truth = truth.permute(0, 2, 3, 1).contiguous()
    features = extractor("efficientnet-lite0", resolution=96)
    true_features = features(truth)
    print(
        f"{options.name} version {model.version}, {len(chosen)} held-out pictures, {options.steps} steps, each stretch of"
        f" {STRETCH} gone {options.repeats} times\n"
        f"{'':20} {'':10} {'PSNR dB':>8} {'SSIM':>7} {'features':>9} {'||Ax-y||':>9} {'s/picture':>9}"
    )
    rows, names = [], []
    for case in cases(bundle.spec.resolution):
        y = case.operator.forward(x0)
        started = time.perf_counter()
        ours = restored(bundle, case.operator, y, label, options.steps, options.repeats)
        taken = (time.perf_counter() - started) / len(y)
        answers = {name: (baseline(y), 0.0) for name, baseline in case.baselines.items()} | {"ours": (ours, taken)}
        for name, (answer, seconds) in answers.items():
            pictures = to_uint8(answer)
            off = (features(pictures) - true_features).norm(dim=1).mean()
            numbers = f"{psnr(pictures, truth).median():8.2f} {ssim(pictures, truth).mean():7.3f} {off:9.2f}"
            consistent = residual(case.operator, answer, y).max()
            print(f"{case.name:20} {name:10} {numbers} {consistent:9.1e} {seconds:9.2f}")
        shown = [to_uint8(next(iter(case.baselines.values()))(y)), to_uint8(ours), truth]
        rows += [picture for part in shown for picture in part[:SHOWN].numpy()]
        names += [case.name, "restored", "true"]
    options.figure.write_bytes(encode_png(grid(rows, min(SHOWN, len(chosen)), names)))
    print(f"figure: {options.figure}")


if __name__ == "__main__":
    main()
