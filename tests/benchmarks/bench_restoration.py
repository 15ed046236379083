"""How well models restore pictures they never saw: `python -m tests.benchmarks.bench_restoration`, after `make demo` and
`diffusion run --preset restorer --until register`; `--trained none` leaves the second out.

Every held-out picture is made small, cut open or grey, and restored as `diffusion restore` does it, under its own class: by
a model that draws (zero-shot) and by one that was trained for the task.  Beside them stand the ways without a model.  PSNR
is the median over the pictures, SSIM and the distance of the features are means, of colorization over those that have
colour.  ||A x - y|| is the largest root mean square, before rounding to 8 bits.  The figure has the measurement, the
restored and the true pictures in rows.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from diffusion.adapters.mlflow_registry import resolve
from diffusion.data.images import encode_png, grid, to_model, to_uint8
from diffusion.data.reader import ShardReader
from diffusion.degradation import beside
from diffusion.evaluation.extractors.features import extractor
from diffusion.evaluation.metrics.fidelity import psnr, ssim
from diffusion.evaluation.restoration import EXACT, Case, case_of, cases_for
from diffusion.guidance import conditioned
from diffusion.operators import BlockMean, Composition, Grey, LinearOperator
from diffusion.random import Stream, normal
from diffusion.recipe import TaskName
from diffusion.restore import REPEATS, STRETCH, TRAINED_STEPS, null_space, residual, zero_shot
from diffusion.sampler import SAMPLERS, Conversation, Noise, run
from diffusion.spacing import detailed_sigmas
from diffusion.store.bundle import Bundle, load_bundle
from diffusion.store.bundle_spec import BundleSpec
from flows.site import Site

BATCH = 16
SHOWN = 12
COMPOSED = "colorization x4"  # a grey picture made small: no model is trained for it


def cases(spec: BundleSpec) -> list[Case]:
    """The measurements, each with what one does without a model: those of every evaluation, and a composition."""
    small = Composition(BlockMean(4), Grey())

    def nearest(y: Tensor) -> Tensor:
        return BlockMean(4).pinv(y).expand(-1, 3, -1, -1)

    known = [case_of(name, spec.size) for name in cases_for(spec)]
    return [*known, Case(COMPOSED, "colorization", small, "nearest", nearest, nearest)]


Way = Callable[[Tensor, Tensor, Noise, LinearOperator, Tensor], Conversation]  # (x, sigmas, noise, A, y)


def by_training(
    x: Tensor, sigmas: Tensor, noise: Noise, operator: LinearOperator, y: Tensor, *, sampler: str
) -> Conversation:
    inner = null_space(SAMPLERS[sampler](x, sigmas, noise), operator, y)
    return conditioned(inner, {"image": beside(operator, operator.pinv(y))})


def restored(bundle: Bundle, way: Way, steps: int, operator: LinearOperator, y: Tensor, label: Tensor) -> Tensor:
    """x0 of all measurements; the noise is a function of the picture's number."""
    recipe, shape = bundle.spec.sampling, (3, bundle.spec.resolution, bundle.spec.resolution)
    sigmas = detailed_sigmas(recipe, steps)
    parts = []
    for rows in torch.arange(len(y)).split(BATCH):

        def noise(step: int, rows: Tensor = rows, stream: Stream = Stream.CHURN) -> Tensor:
            return normal(0, stream, (step << 32) + rows, shape)

        x = noise(0, stream=Stream.INITIAL) * sigmas[0].float()
        conversation = way(x, sigmas, noise, operator, y[rows])
        parts.append(run(conditioned(conversation, {"label": label[rows]}), bundle.denoiser))
    return torch.cat(parts)


def opened(site: Site, name: str, which: str) -> Bundle:
    """A registered model."""
    model = resolve(site.tracking(name), name, which, site.store)
    print(f"{name} version {model.version}, {model.digest[:16]}")
    return load_bundle(model.uri, digest=model.digest)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, default=Path(".diffusion"))
    parser.add_argument("--name", default="demo", help="registered model that draws")
    parser.add_argument("--model", default="champion", help="alias or version of both")
    parser.add_argument("--trained", default="restorer", help="registered model that was trained to restore, or none")
    parser.add_argument("--pictures", type=int, default=1_000)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--trained-steps", type=int, default=TRAINED_STEPS)
    parser.add_argument("--noise", type=float, default=0.0, help="in the measurements; `untold` takes them for exact")
    parser.add_argument("--figure", type=Path, default=Path("restoration.png"))
    options = parser.parse_args()
    site = Site(home=options.home)
    site.prepare()
    drawing = opened(site, options.name, options.model)

    def drawn(sigma_y: float) -> Callable[..., Tensor]:
        return partial(restored, drawing, partial(zero_shot, repeats=options.repeats, sigma_y=sigma_y), options.steps)

    ways = {"zero-shot": drawn(options.noise)} | ({"untold": drawn(0.0)} if options.noise else {})
    learned: tuple[TaskName, ...] = ()
    if options.trained != "none" and not options.noise:  # it knows no noisy measurements
        trained = opened(site, options.trained, options.model)
        learned = trained.spec.degradations
        if trained.spec.dataset_digest != drawing.spec.dataset_digest:
            parser.error("the two models saw other pictures: what one was not shown, the other may have been")
        sampler = partial(by_training, sampler=trained.spec.sampling.sampler)
        ways["trained"] = partial(restored, trained, sampler, options.trained_steps)
    digest = drawing.spec.dataset_digest
    reader = ShardReader(site.store / "datasets" / digest[:16], "holdout", digest=digest)
    chosen = torch.arange(min(options.pictures, len(reader))).numpy()
    pictures = reader.gather(chosen)
    truth, label = torch.from_numpy(pictures.images), torch.from_numpy(pictures.label)
    x0 = to_model(truth)
    colouring = case_of("colorization", drawing.spec.size)
    grey = to_uint8(colouring.guess(colouring.operator.forward(x0)))
    coloured = psnr(grey, truth) < EXACT  # a picture of none is right as it is
    features = extractor("efficientnet-lite0", resolution=96)
    true_features = features(truth)
    print(
        f"{len(chosen)} held-out pictures, {int(coloured.sum())} in colour; zero-shot in {options.steps} steps, each stretch"
        f" of {STRETCH} gone {options.repeats} times; trained in {options.trained_steps} steps\n"
        f"{'':20} {'':10} {'PSNR dB':>8} {'SSIM':>7} {'features':>9} {'||Ax-y||':>9} {'s/picture':>9}"
    )
    rows, names = [], []
    for case in cases(drawing.spec):
        y = case.operator.forward(x0)
        y = y + options.noise * normal(1, Stream.NOISE, torch.from_numpy(chosen), tuple(y.shape[1:]))
        answers = {case.guessed: (case.guess(y), 0.0)}
        for name, way in ways.items():
            if name == "trained" and (case.task not in learned or case.name == COMPOSED):
                continue
            started = time.perf_counter()
            answer = way(case.operator, y, label)
            answers[name] = answer, (time.perf_counter() - started) / len(y)
        counted = coloured if case.task == "colorization" else slice(None)
        for name, (answer, seconds) in answers.items():
            pictures = to_uint8(answer)
            off = (features(pictures) - true_features).norm(dim=1)[counted].mean()
            near, alike = psnr(pictures, truth)[counted], ssim(pictures, truth)[counted]
            numbers = f"{near.median():8.2f} {alike.mean():7.3f} {off:9.2f}"
            consistent = residual(case.operator, answer, y).max()
            print(f"{case.name:20} {name:10} {numbers} {consistent:9.1e} {seconds:9.2f}")
        shown = {case.name: case.given(y)} | {w: answers[w][0] for w in ways if w in answers}
        rows += [picture for part in shown.values() for picture in to_uint8(part[:SHOWN]).numpy()]
        rows += list(truth[:SHOWN].numpy())
        names += [*shown, "true"]
    options.figure.write_bytes(encode_png(grid(rows, min(SHOWN, len(chosen)), names)))
    print(f"figure: {options.figure}")


if __name__ == "__main__":
    main()
