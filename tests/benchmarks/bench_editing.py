"""What editing keeps of a picture and what it changes: `python -m tests.benchmarks.bench_editing`, after `make demo`.

Held-out pictures are edited towards the next class, as `diffusion edit` does it, in each of its ways.  Kept: SSIM with the
reference, mean.  Changed: root mean square, white - black is 2.  Moved: how often the training picture nearest in
EfficientNet-Lite0's features is of the class asked for, and of the picture's own; without an edit that is how well the
features tell classes apart.  The figure has one picture of each class and a row for each way.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffusion.adapters.mlflow_registry import resolve
from diffusion.data.images import encode_png, grid, to_model, to_uint8
from diffusion.data.reader import ShardReader
from diffusion.edit import by_condition, levels_of, low_pass, sdedit
from diffusion.evaluation.extractors.features import extractor
from diffusion.evaluation.metrics.fidelity import ssim
from diffusion.evaluation.plan import evenly
from diffusion.guidance import classifier_free, conditioned
from diffusion.random import Stream, normal
from diffusion.sampler import SAMPLERS, Conversation, run
from diffusion.spacing import detailed_sigmas
from diffusion.store.bundle import Bundle, load_bundle
from flows.site import Site

BATCH = 16
Way = Callable[[Bundle, Tensor, Tensor, Tensor, Tensor], Conversation]  # (bundle, reference, noise, own, wanted)


def _parts(bundle: Bundle, wanted: Tensor) -> tuple[Tensor, Callable, Callable[[Conversation], Conversation]]:
    """The levels, the sampler, and what asks for the class wanted, with the model's own guidance."""
    recipe, cond = bundle.spec.sampling, {"label": wanted}
    null = {"label": torch.full_like(wanted, len(bundle.spec.classes))}
    around = partial(classifier_free, cond=cond, null=null, scale=recipe.guidance, interval=recipe.guidance_interval)
    return detailed_sigmas(recipe, recipe.steps), SAMPLERS[recipe.sampler], around


def noised(
    bundle: Bundle,
    reference: Tensor,
    noise: Tensor,
    own: Tensor,
    wanted: Tensor,
    *,
    strength: float,
    coarse: int | None = None,
) -> Conversation:
    sigmas, sampler, around = _parts(bundle, wanted)
    inner = sdedit(sampler, reference, noise, sigmas, strength=strength)
    if coarse is not None:
        inner = low_pass(inner, reference, factor=coarse, until=bundle.spec.sigma_data)
    return around(inner)


def inverted(
    bundle: Bundle, reference: Tensor, noise: Tensor, own: Tensor, wanted: Tensor, *, strength: float
) -> Conversation:
    sigmas, sampler, around = _parts(bundle, wanted)
    before = partial(conditioned, cond={"label": own})
    return by_condition(sampler, reference, levels_of(sigmas, strength), before=before, after=around)


WAYS: dict[str, Way] = {
    **{f"noised, {strength}": partial(noised, strength=strength) for strength in (0.4, 0.6, 0.8)},
    "noised, 0.8, coarse 8": partial(noised, strength=0.8, coarse=8),
    **{f"inverted, {strength}": partial(inverted, strength=strength) for strength in (0.6, 0.8)},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, default=Path(".diffusion"))
    parser.add_argument("--name", default="demo", help="registered model")
    parser.add_argument("--model", default="champion", help="alias or version")
    parser.add_argument("--pictures", type=int, default=1_000)
    parser.add_argument("--figure", type=Path, default=Path("editing.png"))
    options = parser.parse_args()
    site = Site(home=options.home)
    site.prepare()
    model = resolve(site.tracking(options.name), options.name, options.model, site.store)
    bundle = load_bundle(model.uri, digest=model.digest)
    features = extractor("efficientnet-lite0", resolution=96)

    def read(split: str, n: int | None = None) -> tuple[Tensor, Tensor]:
        folder = site.store / "datasets" / model.dataset_digest[:16]
        reader = ShardReader(folder, split, digest=model.dataset_digest)
        chosen = np.array(evenly(len(reader), n or len(reader)))
        pictures = reader.gather(chosen)
        return torch.from_numpy(pictures.images), torch.from_numpy(pictures.label)

    pictures, own = read("holdout", options.pictures)
    train, train_label = read("train")
    known = features(train)
    wanted = (own + 1) % len(bundle.spec.classes)
    shape = (3, bundle.spec.resolution, bundle.spec.resolution)

    def edited(way: Way) -> Tensor:
        parts = []
        for rows in torch.arange(len(own)).split(BATCH):
            noise = normal(1, Stream.INITIAL, rows, shape)
            reference = to_model(pictures[rows])
            parts.append(run(way(bundle, reference, noise, own[rows], wanted[rows]), bundle.denoiser))
        return to_uint8(torch.cat(parts))

    print(f"{options.name} version {model.version}, {len(own)} held-out pictures, each towards the next class")
    print(f"{'':24} {'kept':>6} {'changed':>8} {'asked for':>10} {'own':>6}")
    first = [int((own == label).nonzero()[0]) for label in own.unique()]
    shown, names = [], []
    for name, way in {"reference": None, **WAYS}.items():
        answer = pictures if way is None else edited(way)
        nearest = train_label[torch.cdist(features(answer), known).argmin(dim=1)]
        off = (to_model(answer) - to_model(pictures)).square().mean().sqrt()
        moved = f"{(nearest == wanted).float().mean():10.0%} {(nearest == own).float().mean():6.0%}"
        print(f"{name:24} {ssim(answer, pictures).mean():6.3f} {off:8.3f} {moved}", flush=True)
        shown += list(answer[first].numpy())
        names.append(name)
    options.figure.write_bytes(encode_png(grid(shown, len(first), names)))
    print(f"figure: {options.figure}")


if __name__ == "__main__":
    main()
