"""How far pictures show what their prompts say: `python -m tests.benchmarks.bench_captions`, after a run of `emoji-text`.

Losses: of pictures under their own captions, under none and under each other's, with their class and without.  Pictures:
drawn from captions alone, and beside them from the class alone.  Is the training picture nearest to a drawn one in features
that know nothing of words (EfficientNet-Lite0) of the caption's class, and where does the captioned picture come when all
of its split are sorted by their distance?  Chance is what other captions' pictures score.  Training never saw the held-out
split.  The figure has a row for each prompt.
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
from diffusion.data.reader import ShardReader
from diffusion.evaluation.extractors.features import extractor
from diffusion.evaluation.facts.held_out import held_out_loss
from diffusion.evaluation.plan import evenly
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


def drawn(engine: Engine, asked: Sequence[dict[str, str | None]], n: int, guidance: float | None) -> Tensor:
    """Pictures uint8 (P, n, H, W, 3) of each label or prompt; the seed is its number."""
    requests = [GenerateRequest(**what, seed=i, n=n, guidance=guidance) for i, what in enumerate(asked)]
    return torch.from_numpy(np.stack([np.stack(pictures) for pictures in engine.generate(requests)]))


def agreement(features: Tensor, label: Tensor, train: Split) -> tuple[float, float]:
    """How often the training picture nearest to one of features (P, n, D) has its class of label (P,), and by chance."""
    nearest = train.label[torch.cdist(features, train.features).argmin(2)]
    agrees = (nearest[:, :, None] == label).float()  # (P, n, P): with the class of each caption
    return agrees.diagonal(dim1=0, dim2=2).mean().item(), agrees.mean().item()


def median_rank(features: Tensor, split: Split, own: Tensor) -> float:
    """How many pictures of the split are nearer to one of features (P, n, D) than number own (P,)."""
    distance = torch.cdist(features, split.features)
    mine = distance.gather(2, own.view(-1, 1, 1).expand(-1, features.shape[1], 1))
    return (distance < mine).sum(2).float().median().item()


def losses(bundle: Bundle, split: Split, rows: Tensor) -> None:
    """By noise level, and how much less own captions give than none, picture by picture."""
    recipe, x0 = EvaluateRecipe(), to_model(split.images[rows].permute(0, 3, 1, 2))
    captions = [split.captions[i] for i in rows]
    told = {"own": captions, "none": [""] * len(captions), "another's": captions[1:] + captions[:1]}
    null = torch.full_like(rows, len(bundle.spec.classes))
    for level, sigma in enumerate(recipe.loss_levels):
        for name, label in {"class": split.label[rows], "no class": null}.items():
            found = {}
            for which, text in told.items():
                cond = {"label": label, **bundle.encoder(text)._asdict()}
                found[which] = held_out_loss(bundle.denoiser, x0, cond, level=level, recipe=recipe)["loss"]
            gain = found["none"] - found["own"]
            error = gain.std(ddof=1) / len(gain) ** 0.5
            said = ", ".join(f"{which} {loss.mean():.4f}" for which, loss in found.items())
            print(
                f"  sigma {sigma:<4g} {name:8}  {said}; own below none by {gain.mean():.4f} ± {error:.4f}", flush=True
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, default=Path(".diffusion"))
    parser.add_argument("--name", default="emoji-text", help="registered model")
    parser.add_argument("--model", default="champion", help="alias or version")
    parser.add_argument("--captions", type=int, default=24, help="of each split, to draw")
    parser.add_argument("--losses", type=int, default=128, help="pictures of each split whose losses are measured")
    parser.add_argument("--guidance", type=float, help="[the model's]")
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
        read = reader.gather(np.arange(len(reader)))
        pictures = torch.from_numpy(read.images)
        return Split(pictures, read.texts, torch.from_numpy(read.label), features(pictures))

    print(f"{options.name} version {model.version}")
    train = read("train")
    for name, split in (("train", train), ("holdout", read("holdout"))):
        print(f"{name}: {len(split.label):,} pictures", flush=True)
        losses(bundle, split, torch.tensor(evenly(len(split.label), options.losses)))
        own = torch.tensor(evenly(len(split.label), options.captions))
        asked = {
            "caption": [{"prompt": prompt_of(split.captions[i])} for i in own],
            "class": [{"label": bundle.spec.classes[split.label[i]]} for i in own],
        }
        for what, wanted in asked.items():
            pictures = drawn(engine, wanted, options.n, options.guidance)
            found = features(pictures.flatten(0, 1)).unflatten(0, pictures.shape[:2])
            agrees, chance = agreement(found, split.label[own], train)
            ranks = [median_rank(found, split, rows) for rows in (own, own.roll(1))]
            print(
                f"  drawn by {what:8} {len(own)} x {options.n}: nearest training picture of its class {agrees:.1%}, by"
                f" chance {chance:.1%}; median rank of its own picture {ranks[0]:.0f}, of another's {ranks[1]:.0f}",
                flush=True,
            )
    rows = drawn(engine, [{"prompt": prompt} for prompt in PROMPTS], SHOWN, options.guidance)
    options.figure.write_bytes(encode_png(grid(list(rows.flatten(0, 1).numpy()), SHOWN, PROMPTS)))
    print(f"figure: {options.figure}")


if __name__ == "__main__":
    main()
