"""Quality per compute against diffusers' default recipe: `python -m tests.benchmarks.bench_quality`.

Both sides learn the same training pictures by class, in as many pictures seen, in batches of the same size, with networks of
equal forward FLOPs, and are judged by the Frechet distance of `diffusion evaluate`: the same extractor, reference, number of
samples and class frequencies.

ours       the preset's training recipe at 32 px, everything in it that counts images scaled to the run; drawn as the preset
           draws, and for comparison without guidance in as many evaluations
diffusers  its training script (`diffusers_script.py`) around its `UNet2DModel`, given our classes and our share of dropped
           labels; the warm-up is the share of the run that 500 steps are of the script's example.  Drawn by DDIM in 50
           evaluations, from the raw weights, from the EMA, and from it with our guidance, and trained at several learning
           rates: what counts is the best of all these for it, beside it the recipe as it is

Pictures: the embedded emoji, or with `--fashion-mnist FOLDER` Fashion-MNIST from its four IDX files, by the protocol of
docs/training.md, whose network wants a GPU: `--small` is the demo's, and its training, in its place.  The floor is what
real pictures score in the place of drawn ones.

Each trained side takes minutes and is kept, with a grid of its samples, in `--out`; the same command goes on where it was
interrupted, and prints the table of what there is.
"""

import argparse
import gzip
import json
import math
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from diffusion.data.images import to_model
from diffusion.data.ingest import shard_dataset
from diffusion.data.reader import ShardReader
from diffusion.data.reading_order import order_of
from diffusion.data.stream import batches
from diffusion.denoiser import denoiser_of
from diffusion.evaluation import plan
from diffusion.evaluation.extractors.features import extractor
from diffusion.evaluation.metrics.frechet import Gaussian
from diffusion.evaluation.metrics.sample import frechet_to
from diffusion.evaluation.metrics.splits import allocate, floor
from diffusion.evaluation.reference import LIMIT, ReferenceIdentity, recall, remember
from diffusion.evaluation.report.report import class_grid
from diffusion.presets import demo, fashion_mnist
from diffusion.recipe import Recipe, ShardRecipe, TrainRecipe, canonical_json, digest_of
from diffusion.sampler import evaluations
from diffusion.serving.engine import Engine
from diffusion.serving.request import GenerateRequest
from diffusion.store.bundle import export_bundle, load_bundle
from diffusion.store.publish import write_atomic
from diffusion.store.refs import DatasetRef, RunRef
from diffusion.threads import one_thread
from diffusion.training import checkpoint
from diffusion.training.loop import train
from diffusion.training.step import build_state, end_of
from tests.benchmarks import diffusers_script
from tests.benchmarks.bench_train_step import Peer, forward_flops, peer_net

RATIO = 0.6  # our distance at most, over theirs
SIDE = 32
LEVELS = 3  # of their network: attention at 8 x 8, as ours
LRS = (diffusers_script.LEARNING_RATE, 3e-4, 1e-3)
WARMUP = 0.08  # 500 steps of the 6,300 that the script's example takes: 1,000 pictures, batches of 16, 100 epochs
EVALUATIONS = 50
OURS, THEIRS = "ours", "diffusers"
EMA = "EMA"  # their recipe's own way of drawing
IDX = {"train": "train", "test": "t10k"}


class Data(NamedTuple):
    """Pictures to learn and to compare with."""

    name: str
    train: DatasetRef
    test: DatasetRef | None


Drawn = tuple[
    str, int, np.ndarray
]  # name, evaluations of the network for a picture, uint8 (N, H, W, 3) sorted by class
Draw = Callable[[], Iterator[Drawn]]  # what a trained side can draw


class Scored(NamedTuple):
    """One way of drawing, measured."""

    name: str
    evaluations: int  # of the network, for a picture
    frechet: float
    standard_error: float


def emoji(folder: Path) -> Data:
    shard = demo().shard.model_copy(update={"resolution": SIDE})
    return Data("emoji", shard_dataset("embedded", shard, folder), None)


def fashion(source: Path, folder: Path) -> Data:
    """The splits as they are published, 28 px padded to 32 with their black."""
    refs = []
    for split, prefix in IDX.items():
        padded = folder / f"idx-{split}"
        padded.mkdir(parents=True, exist_ok=True)
        pictures, labels = (read_idx(source, f"{prefix}-{kind}") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"))
        if pictures.shape[1:] != (28, 28):
            raise SystemExit(f"{source} has {prefix} pictures of {pictures.shape[1:]}, Fashion-MNIST's have (28, 28)")
        write_idx(padded / f"{prefix}-images-idx3-ubyte", np.pad(pictures, ((0, 0), (2, 2), (2, 2))))
        write_idx(padded / f"{prefix}-labels-idx1-ubyte", labels)
        refs.append(shard_dataset(padded, ShardRecipe(resolution=SIDE, shard_size=1_024, holdout=0), folder))
    return Data("fashion-mnist", *refs)


def read_idx(folder: Path, name: str) -> np.ndarray:
    for path, opener in ((folder / name, open), (folder / f"{name}.gz", gzip.open)):
        if path.is_file():
            with opener(path, "rb") as file:
                data = file.read()
            shape = np.frombuffer(data, ">i4", count=data[3], offset=4)
            return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape)
    raise SystemExit(
        f"{folder} has neither {name} nor {name}.gz: give the folder of Fashion-MNIST's four IDX files, as in"
        " --fashion-mnist /usr/share/datasets/fashion-mnist, where Debian's package dataset-fashion-mnist puts them"
    )


def write_idx(path: Path, array: np.ndarray) -> None:
    path.write_bytes(bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.tobytes())


def scaled(recipe: TrainRecipe, *, images: int, seed: int) -> TrainRecipe:
    """The recipe for a run of other length."""
    warmup = round(recipe.warmup_images * images / recipe.images)
    changed = {"images": images, "warmup_images": warmup, "checkpoint_images": images, "seed": seed}
    return TrainRecipe.model_validate(recipe.model_dump() | changed)


class Bench:
    """Everything that both sides share, and what is known already."""

    def __init__(self, data: Data, line: Recipe, *, samples: int, out: Path, device: str) -> None:
        self.data, self.out, self.device = data, out, device
        self.train, self.sampling = line.train, line.evaluate.sampling
        self.recipe = line.evaluate.model_copy(update={"samples": samples})
        self.classes = data.train.classes
        self.reader = ShardReader(data.train.uri, digest=data.train.digest, captions=False)
        self.wanted = allocate(list(self.reader.manifest.train_counts), samples)
        shape = {"resolution": SIDE, "classes": len(self.classes), "sigma_data": self.train.sigma_data}
        self.flops = forward_flops(denoiser_of(self.train.unet, precision="fp32", **shape), SIDE)
        net = peer_net(self.flops, SIDE, len(self.classes), levels=LEVELS)
        self.peer, self.peer_flops = net.config, forward_flops(Peer(net, "fp32", torch.contiguous_format), SIDE)
        self.extractor = extractor(self.recipe.extractor, resolution=self.recipe.extractor_resolution, device=device)
        self.reference = Gaussian.of(self.real(self.reader, LIMIT))

    def real(self, reader: ShardReader, most: int) -> torch.Tensor:
        """Features of the training pictures of a dataset, evenly spaced, as an evaluation keeps them."""
        chosen = plan.evenly(len(reader), most)
        identity = ReferenceIdentity(
            dataset_digest=reader.manifest.digest,
            pictures=len(chosen),
            extractor=self.extractor.identity,
            torch=torch.__version__,
            device=self.device,
        )
        known = recall(self.out, identity)
        if known is None:
            parts = torch.tensor(chosen).split(plan.REAL_PICTURES)
            known = np.concatenate([self.features(reader.gather(part.numpy()).images) for part in parts])
            remember(self.out, identity, known)
        return torch.from_numpy(known)

    def features(self, pictures: np.ndarray) -> np.ndarray:
        with one_thread():
            return self.extractor(torch.from_numpy(pictures)).numpy()

    def floor(self) -> str:
        """What real pictures score in the place of drawn ones: of the training split, and of another where there is one."""
        samples, labels = self.recipe.samples, torch.from_numpy(self.reader.labels)
        chosen = list(plan.evenly(len(labels), LIMIT))
        with one_thread():
            found = floor(self.real(self.reader, LIMIT), labels[chosen], samples, seed=self.recipe.seed)
        told = (
            f"{found.pictures} training pictures against the {found.against} others: {found.value:.1f} ± {found.spread:.1f}"
            f" between {found.splits} splits"
        )
        if self.data.test is None:
            return told
        test = ShardReader(self.data.test.uri, digest=self.data.test.digest, captions=False)
        features = self.real(test, samples)
        with one_thread():
            apart = frechet_to(self.reference, features)
        return f"{told}; {len(features)} test pictures: {apart.value:.1f} ± {apart.standard_error:.1f}"

    def scored(self, name: str, asked: int, pictures: np.ndarray) -> Scored:
        with one_thread():
            found = frechet_to(self.reference, torch.from_numpy(self.features(pictures)))
        return Scored(name, asked, found.value, found.standard_error)

    def by_class(self, pictures: np.ndarray) -> np.ndarray:
        """A grid of the first pictures of each class; they are sorted by class."""
        starts = np.cumsum([0, *self.wanted])
        rows = [list(pictures[a : min(b, a + 12)]) for a, b in pairwise(starts)]
        return class_grid(rows, self.classes)

    def settings(self, side: str, *, images: int, seed: int, lr: float) -> dict:
        """What a result depends on."""
        facts = {"side": side, "images": images, "seed": seed, "lr": lr, "data": self.data.train.digest}
        if side == OURS:
            facts["recipe"] = digest_of(scaled(self.train, images=images, seed=seed))
        else:
            widths = list(self.peer.block_out_channels)
            facts |= {"widths": widths, "label_drop": self.train.label_drop, "batch_size": self.train.batch_size}
        return facts | {"evaluate": digest_of(self.recipe)}

    def once(self, side: str, *, images: int, seed: int, lr: float) -> dict:
        """The record of one trained side: kept, or trained and drawn and measured now."""
        settings = self.settings(side, images=images, seed=seed, lr=lr)
        name = f"{self.data.name}-{side}-{lr:g}-seed{seed}-{images}-{digest_of(settings)[:8]}"
        path = self.out / f"{name}.json"
        if not path.exists():
            draw = (self.ours if side == OURS else self.theirs)(images=images, seed=seed, lr=lr)
            ways, best = [], None
            for way, asked, pictures in draw():
                ways.append(self.scored(way, asked, pictures))
                if ways[-1].frechet == min(each.frechet for each in ways):
                    best = pictures
            Image.fromarray(self.by_class(best)).save(self.out / f"{name}.png")
            write_atomic(path, canonical_json(settings | {"ways": [way._asdict() for way in ways]}))
            print(f"{name}: {', '.join(f'{way.name} {way.frechet:.0f}' for way in ways)}", flush=True)
        return json.loads(path.read_bytes())

    def ours(self, *, images: int, seed: int, lr: float) -> Draw:
        """Train as `train_stage` does, in this process; the raw weights are never served."""
        recipe = scaled(self.train, images=images, seed=seed)
        assert recipe.lr == lr
        state = build_state(recipe, resolution=SIDE, classes=len(self.classes), device=self.device)
        order = order_of(self.reader.manifest, "train", recipe)
        stop = end_of(recipe)
        train(
            state,
            batches(self.reader, order, recipe.batch_size, start=0, stop=stop, seed=recipe.seed, threads=1),
            recipe,
        )
        facts = checkpoint.facts_of(recipe, self.data.train, world=1, device=torch.device(self.device))

        def draw() -> Iterator[Drawn]:
            with TemporaryDirectory(prefix="bench-") as folder:
                at = Path(folder, "checkpoint")
                run = RunRef(
                    uri=str(at),
                    digest=checkpoint.save(state, at, facts),
                    recipe_digest=digest_of(recipe),
                    dataset=self.data.train,
                    images_seen=state.images_seen,
                )
                uri, digest = export_bundle(run, self.recipe.ema, Path(folder), self.sampling)
                engine = Engine(load_bundle(uri, self.device, digest=digest), slots=self.recipe.batch_size)
            plans = plan.draws(self.reader.manifest.train_counts, self.recipe.model_copy(update={"seed": seed}))
            sampler, steps, guidance = self.sampling.sampler, self.sampling.steps, self.sampling.guidance
            ways = {f"guidance {guidance:g}": (steps, guidance), "without guidance": (2 * steps, 1.0)}
            for way, (taken, strength) in ways.items():
                asked = [
                    GenerateRequest(label=self.classes[one.label], seed=one.seed, steps=taken, guidance=strength)
                    for one in plans
                    if one.measured
                ]
                pictures = [pictures[0] for pictures in engine.generate(asked)]
                yield way, evaluations(sampler, taken) * (1 if strength == 1 else 2), np.stack(pictures)

        return draw

    def theirs(self, *, images: int, seed: int, lr: float) -> Draw:
        from diffusers import UNet2DModel

        torch.manual_seed(seed)
        net = UNet2DModel.from_config(self.peer).to(self.device, memory_format=torch.channels_last)
        size, steps = self.train.batch_size, images // self.train.batch_size
        everything = self.reader.gather(np.arange(len(self.reader)))
        pictures = to_model(torch.from_numpy(everything.images)).contiguous(memory_format=torch.channels_last)
        labelled = TensorDataset(pictures, torch.from_numpy(everything.label))
        loader = DataLoader(labelled, size, shuffle=True, drop_last=True)
        warmup = min(diffusers_script.WARMUP_STEPS, round(WARMUP * steps))
        script = diffusers_script.script_of(net, steps=steps, lr=lr, warmup_steps=warmup)
        for x0, label in islice(diffusers_script.endless(loader), steps):
            operands = (x0.to(self.device), label.to(self.device))
            diffusers_script.step(script, *operands, label_drop=self.train.label_drop)
        label = torch.arange(len(self.classes)).repeat_interleave(torch.tensor(self.wanted)).to(self.device)

        def draw() -> Iterator[Drawn]:
            net.eval()
            found = partial(diffusers_script.draw, net, label, seed=seed, batch_size=self.recipe.batch_size, side=SIDE)
            yield "raw", EVALUATIONS, found(steps=EVALUATIONS, guidance=1.0).numpy()
            script.average.copy_to(net.parameters())
            yield EMA, EVALUATIONS, found(steps=EVALUATIONS, guidance=1.0).numpy()
            guidance = self.sampling.guidance
            yield f"EMA, guidance {guidance:g}", EVALUATIONS, found(steps=EVALUATIONS // 2, guidance=guidance).numpy()

        return draw


def best_of(record: dict) -> dict:
    return min(record["ways"], key=lambda way: way["frechet"])


def over(a: dict, b: dict) -> tuple[float, float]:
    """The ratio of two distances and its standard error, theirs being independent."""
    ratio = a["frechet"] / b["frechet"]
    return ratio, ratio * math.hypot(*(way["standard_error"] / way["frechet"] for way in (a, b)))


def shown(way: dict) -> str:
    return f"{way['frechet']:.0f} ± {way['standard_error']:.0f}"


def compared(bench: Bench, *, images: int, seeds: list[int], lrs: list[float]) -> list[float]:
    """Train what is missing, of the first seed at every learning rate, of the others at the default and the best of those;
    print a line for each seed.  Returns the ratios."""
    chosen, ratios = lrs, []
    for seed in seeds:
        mine = bench.once(OURS, images=images, seed=seed, lr=bench.train.lr)
        records = [bench.once(THEIRS, images=images, seed=seed, lr=lr) for lr in chosen]
        best = min(records, key=lambda record: best_of(record)["frechet"])
        if seed == seeds[0]:
            chosen = sorted({lrs[0], best["lr"]})
            for record in (mine, *records):
                ways = "".join(
                    f"\n    {w['name']:<20} {w['evaluations']} evaluations  {shown(w)}" for w in record["ways"]
                )
                print(f"  {record['side']}, learning rate {record['lr']:g}{ways}")
        as_it_is = next(way for way in records[0]["ways"] if way["name"] == EMA)
        own, other = mine["ways"][0], best_of(best)
        ratio, error = over(own, other)
        plain, plain_error = over(own, as_it_is)
        free = over(mine["ways"][1], other)[0]
        ratios.append(ratio)
        print(
            f"seed {seed}: ours {shown(own)}, best of theirs {shown(other)} (learning rate {best['lr']:g}, {other['name']}):"
            f" {ratio:.3f} ± {error:.3f} (ours without guidance {free:.3f}); as the recipe is {shown(as_it_is)}:"
            f" {plain:.3f} ± {plain_error:.3f}",
            flush=True,
        )
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fashion-mnist", type=Path, help="folder with its four IDX files, also as .gz")
    parser.add_argument(
        "--small", action="store_true", help="Fashion-MNIST by the demo's recipe, which a CPU can train"
    )
    parser.add_argument("--images", type=int, help="pictures seen by each side (default: the preset's)")
    parser.add_argument("--samples", type=int, help="pictures drawn and measured (default: the preset's)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--lrs", type=float, nargs="+", default=LRS, help="of diffusers, its default first")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(".diffusion/bench-quality"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    line = fashion_mnist() if args.fashion_mnist and not args.small else demo()
    data = fashion(args.fashion_mnist, args.out) if args.fashion_mnist else emoji(args.out)
    bench = Bench(data, line, samples=args.samples or line.evaluate.samples, out=args.out, device=device)
    images = args.images or line.train.images
    images -= images % line.train.batch_size
    print(
        f"{data.name}, {SIDE} x {SIDE}, {len(bench.reader):,} training pictures, {len(bench.classes)} classes, {images:,}"
        f" seen in batches of {line.train.batch_size}; {bench.recipe.samples} samples, {bench.extractor.identity.name}\n"
        f"forward pass {bench.flops / 1e9:.3f} GFLOP, diffusers' {tuple(bench.peer.block_out_channels)}"
        f" {bench.peer_flops / 1e9:.3f}\nfloor: {bench.floor()}",
        flush=True,
    )
    ratios = compared(bench, images=images, seeds=args.seeds, lrs=list(args.lrs))
    worst, middle = max(ratios), statistics.median(ratios)
    print(
        f"ours over the best of theirs, {len(ratios)} seeds: median {middle:.3f}, {min(ratios):.3f} to {worst:.3f}; limit"
        f" {RATIO} for every seed: {'passed' if worst <= RATIO else 'FAILED'}"
    )
    raise SystemExit(worst > RATIO)


if __name__ == "__main__":
    main()
