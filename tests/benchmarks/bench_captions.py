"""How far pictures show what their prompts say: `python -m tests.benchmarks.bench_captions`, after a run of `emoji-text`.

Pictures are drawn from captions alone, without their class: captions of training pictures, and of held-out ones, which
training never saw.  Two questions to each, asked of features that know nothing of words (EfficientNet-Lite0): is the
training picture nearest to it of the caption's class, and where is the captioned picture among all of its split when they
are sorted by their distance to it?  Chance is what other captions' pictures score.  The losses are those of held-out
pictures under their own captions, under none and under each other's, class given.  The figure has a row for each prompt.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffusion.adapters.mlflow_registry import resolve
from diffusion.data.images import encode_png, grid, to_model
from diffusion.data.stream import ShardReader
from diffusion.evaluation.features import extractor
from diffusion.evaluation.plan import evenly
from diffusion.evaluation.worker import held_out_loss
from diffusion.recipe import EvaluateRecipe
from diffusion.serving.engine import Engine
from diffusion.serving.request import GenerateRequest, prompt_of
from diffusion.store.bundle import Bundle, load_bundle
from flows.site import Site

PROMPTS = (  # most of them are no caption of a picture
    "yellow heart",
    "red heart",
    "japan flag",
    "a blue flag",
    "grinning face with sunglasses",
    "angry cat face",
    "police car",
    "clock face one oclock",
    "palm tree",
    "woman with red hair",
)
SHOWN = 8


class Split(NamedTuple):
    images: Tensor  # uint8 (N, H, W, 3)
    captions: list[str]
    label: Tensor  # (N,)
    features: Tensor  # (N, D)


def drawn(engine: Engine, prompts: Sequence[str | None], n: int) -> np.ndarray:
    """Pictures uint8 (P, n, H, W, 3); the seed is the prompt's number."""
    requests = [GenerateRequest(prompt=prompt, seed=i, n=n) for i, prompt in enumerate(prompts)]
    return np.stack([np.stack(pictures) for pictures in engine.generate(requests)])


def ranks(features: Tensor, real: Tensor, own: Tensor) -> Tensor:
    """features (P, n, D), own (P,): how many of the real pictures (N, D) are nearer than the one with the caption."""
    distance = torch.cdist(features.flatten(0, 1), real).unflatten(0, features.shape[:2])  # (P, n, N)
    return (distance < distance.gather(2, own.view(-1, 1, 1).expand(-1, features.shape[1], 1))).sum(2)


def report(name: str, features: Tensor, split: Split, own: Tensor, train: Split) -> None:
    """One line: class agreement and retrieval, each beside chance."""
    nearest = train.label[torch.cdist(features.flatten(0, 1), train.features).argmin(1)].view(features.shape[:2])
    agrees = nearest[:, :, None] == split.label[own]  # (P, n, P): with each caption's class
    rank, others = ranks(features, split.features, own), ranks(features, split.features, own.roll(1))
    numbers = [agrees.diagonal(dim1=0, dim2=2), agrees]
    numbers += [part < top for top in (1, 10) for part in (rank, others)]
    said = "  ".join(f"{part.float().mean():6.1%}" for part in numbers)
    print(f"{name:10} {len(own):4} x {features.shape[1]}  {said}  {rank.float().median():7.0f} of {len(split.label)}")


def losses(bundle: Bundle, split: Split, recipe: EvaluateRecipe) -> None:
    """Held-out loss by noise level under each kind of caption, and how much less it is picture by picture."""
    x0 = to_model(split.images.permute(0, 3, 1, 2))
    told = {"own": split.captions, "none": [""] * len(x0), "another's": split.captions[1:] + split.captions[:1]}
    for level, sigma in enumerate(recipe.loss_levels):
        found = {
            name: held_out_loss(
                bundle.denoiser,
                x0,
                {"label": split.label, **bundle.encoder(captions)._asdict()},
                level=level,
                recipe=recipe,
            )["loss"]
            for name, captions in told.items()
        }
        gain = found["none"] - found["own"]
        error = gain.std(ddof=1) / len(gain) ** 0.5
        said = ", ".join(f"{name} {loss.mean():.4f}" for name, loss in found.items())
        print(f"sigma {sigma:<5g} {said}; own below none by {gain.mean():.4f} ± {error:.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, default=Path(".diffusion"))
    parser.add_argument("--name", default="emoji-text", help="registered model")
    parser.add_argument("--model", default="champion", help="alias or version")
    parser.add_argument("--captions", type=int, default=48, help="of each split")
    parser.add_argument("--n", type=int, default=4, help="pictures of each caption")
    parser.add_argument("--figure", type=Path, default=Path("captions.png"))
    options = parser.parse_args()
    site = Site(home=options.home)
    site.prepare()
    model = resolve(site.tracking(options.name), options.name, options.model, site.store)
    bundle = load_bundle(model.uri, digest=model.digest)
    engine = Engine(bundle, slots=32)
    features = extractor("efficientnet-lite0", resolution=96)

    def read(name: str) -> Split:
        reader = ShardReader(site.store / "datasets" / model.dataset_digest[:16], name, digest=model.dataset_digest)
        images, captions = reader.gather(np.arange(len(reader)))
        pictures = torch.from_numpy(images).permute(0, 2, 3, 1).contiguous()
        return Split(pictures, captions, torch.from_numpy(reader.labels), features(pictures))

    splits = {name: read(name) for name in ("train", "holdout")}
    print(f"{options.name} version {model.version}; a caption without its class; chance in each second column")
    print(f"{'':10} {'pictures':8}  nearest of its class   own nearest      own in 10     median rank of own")
    for name, split in splits.items():
        own = torch.tensor(evenly(len(split.captions), options.captions))
        pictures = drawn(engine, [prompt_of(split.captions[i]) for i in own], options.n)
        found = features(torch.from_numpy(pictures).flatten(0, 1)).unflatten(0, pictures.shape[:2])
        report(name, found, split, own, splits["train"])
    losses(bundle, splits["holdout"], EvaluateRecipe())
    rows = drawn(engine, PROMPTS, SHOWN)
    options.figure.write_bytes(encode_png(grid([p for row in rows for p in row], SHOWN, PROMPTS)))
    print(f"figure: {options.figure}")


if __name__ == "__main__":
    main()
