"""Whole trainers in images/s, on the same pictures at equal FLOPs: `python -m tests.benchmarks.bench_trainers`.

Each trains as a user of it does: pictures read and decoded, noise, step, clipping, learning rate, EMA, the loss read and
logged, checkpoints (one is timed in each turn and counted as often as it comes by default).  Each has a process of its own,
kept alive; they take turns, and what counts is the median over the turns of the ratio within a turn.

ours       `training.loop` with the reader, two averages, metrics and checkpoints, in one process; what Ray Train adds
           to it is measured by `bench_train_overhead`
diffusers  its training script with accelerate (`diffusers_script.py`), its `UNet2DModel`
lucidrains `Trainer`, `GaussianDiffusion` and `Unet` of denoising-diffusion-pytorch; no FID, no mirrored pictures.  It wants
           torchvision, of which it needs a few transformations; where that is missing they are stood in for

Both peers in float32, their default, and in bf16, by the option that each has for it; the faster counts.  The pictures that
they draw as they train are left out, and so are their trackers.  Needs `pip install accelerate denoising-diffusion-pytorch`;
what is not installed says so.

MFU is three times the forward pass over the peak measured for that precision (`diffusion/peak.py`).
"""

import argparse
import importlib.util
import multiprocessing
import os
import statistics
import sys
import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset

from diffusion.data.images import encode_png
from diffusion.data.ingest import shard_dataset
from diffusion.data.reader import ShardReader
from diffusion.data.reading_order import order_of
from diffusion.data.stream import batches
from diffusion.denoiser import denoiser_of
from diffusion.peak import peaks
from diffusion.presets import PRESETS
from diffusion.recipe import TrainRecipe
from diffusion.store.refs import DatasetRef
from diffusion.training import checkpoint
from diffusion.training.figures import Figures
from diffusion.training.loop import alone, ignore, metrics_images_of, train
from diffusion.training.saving import Saving
from diffusion.training.step import build_state
from tests.benchmarks import diffusers_script
from tests.benchmarks.bench_train_step import Peer, forward_flops, peer_net

LIMITS = {"cpu": 1.8, "cuda": 2.0}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LUCIDRAINS_EVERY = 1_000  # steps to a checkpoint, its default


class Setting(NamedTuple):
    """What every side is told."""

    recipe: TrainRecipe
    dataset: DatasetRef
    folder: Path  # pictures/<number>.png, and a folder of each side
    labels: tuple[int, ...]
    flops: int  # of our forward pass
    threads: int


class Network(NamedTuple):
    flops: int  # of the forward pass of a picture
    name: str


class Trainer(NamedTuple):
    """A side as its process runs it."""

    network: Network
    steps: Callable[[int], object]  # takes so many optimizer steps
    checkpoint: Callable[[], object]
    every: int  # steps to a checkpoint


def finished() -> float:
    """The time when the device has done what was asked."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def ours(setting: Setting, _: str) -> Trainer:
    recipe, dataset, side = setting.recipe, setting.dataset, setting.dataset.resolution
    device = torch.device(DEVICE)
    state = build_state(recipe, resolution=side, classes=len(dataset.classes), device=device)
    reader = ShardReader(dataset.uri, digest=dataset.digest, captions=False)
    order = order_of(reader.manifest, "train", recipe)
    facts = checkpoint.facts_of(recipe, dataset, world=1, device=device)
    figures = Figures(recipe, side, peak=1.0, device=device, gather=alone)
    share = figures.counted(batches(reader, order, recipe.batch_size, start=0, seed=recipe.seed, threads=1))

    def steps(count: int) -> None:
        end = state.images_seen + count * recipe.batch_size
        turn = recipe.model_copy(update={"images": end, "checkpoint_images": end})
        train(
            state,
            share,
            turn,
            on_metrics=figures.telling(ignore),
            metrics_images=metrics_images_of(recipe),  # as often as in a whole run
        )

    def save() -> None:
        with Saving(setting.folder / "ours", facts) as saving:
            saving.begin(state)

    network = Network(setting.flops, f"U-Net of {recipe.unet.channels} channels, {recipe.precision}")
    return Trainer(network, steps, save, recipe.checkpoint_images // recipe.batch_size)


class Pictures(Dataset):
    """The files as the script's transformations leave them."""

    def __init__(self, folder: Path, labels: tuple[int, ...]) -> None:
        self.folder, self.labels = folder, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        with Image.open(self.folder / f"{i}.png") as image:
            return to_tensor(image.convert("RGB")) * 2 - 1, self.labels[i]


def to_tensor(image: Image.Image) -> torch.Tensor:
    """A picture as (3, H, W) in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255)


def diffusers(setting: Setting, precision: str) -> Trainer:
    from accelerate import Accelerator

    recipe, side, classes = setting.recipe, setting.dataset.resolution, len(setting.dataset.classes)
    accelerator = Accelerator(mixed_precision="no" if precision == "fp32" else precision)
    net = peer_net(setting.flops, side, classes, levels=4)
    flops = forward_flops(Peer(net, "fp32", torch.contiguous_format), side)
    script = diffusers_script.script_of(net, steps=10_000, accelerator=accelerator)
    accelerator.register_for_checkpointing(script.average)
    pictures = Pictures(setting.folder / "pictures", setting.labels)
    loader = accelerator.prepare(DataLoader(pictures, recipe.batch_size, shuffle=True, drop_last=True))
    shuffled = diffusers_script.endless(loader)

    def steps(count: int) -> None:
        for x0, label in islice(shuffled, count):
            diffusers_script.step(script, x0, label)

    save = partial(accelerator.save_state, str(setting.folder / f"diffusers-{precision}"))
    network = Network(flops, f"UNet2DModel {tuple(script.net.config.block_out_channels)}")
    return Trainer(network, steps, save, diffusers_script.CHECKPOINT_STEPS)


class Unlabelled(nn.Module):
    """A network without classes behind the signature that `forward_flops` asks."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return self.net(x, sigma)


class _Already:
    """Resize and CenterCrop of pictures that have the size."""

    def __init__(self, _: int) -> None:
        pass

    def __call__(self, image: Image.Image) -> Image.Image:
        return image


class _Compose:
    def __init__(self, transforms: list[Callable]) -> None:
        self.transforms = transforms

    def __call__(self, image: Image.Image) -> torch.Tensor:
        for transform in self.transforms:
            image = transform(image)
        return image


def stand_in() -> None:
    """What denoising-diffusion-pytorch needs of torchvision, where there is none."""
    if importlib.util.find_spec("torchvision") is None:
        import accelerate  # noqa: F401  looks for the real one, so before there is another

        own = {
            "Compose": _Compose,
            "Lambda": lambda function: function,
            "Resize": _Already,
            "CenterCrop": _Already,
            "ToTensor": lambda: to_tensor,
        }
        modules = {
            name: types.ModuleType(name) for name in ("torchvision", "torchvision.transforms", "torchvision.utils")
        }
        vars(modules["torchvision.transforms"]).update(own)
        modules["torchvision"].transforms = modules["torchvision.transforms"]
        modules["torchvision"].utils = modules["torchvision.utils"]
        sys.modules.update(modules)


def lucidrains_net(flops: int, side: int) -> tuple[nn.Module, str]:
    """`Unet` of its default depth within 2 % of the FLOPs: the widest that has no more, its heads as wide for its width as
    those of its default, then its heads widened."""
    from denoising_diffusion_pytorch import Unet

    def cost(dim: int, head: int) -> float:
        with torch.device("meta"):  # shapes without values
            return forward_flops(Unlabelled(Unet(dim, attn_dim_head=head)), side) / flops

    dim = 8
    while cost(dim + 2, dim // 2 + 1) <= 1.02:
        dim += 2
    head = dim // 2
    while cost(dim, head) < 0.98:
        head += 1
    if not 0.98 <= cost(dim, head) <= 1.02:
        raise ValueError(f"no width of denoising-diffusion-pytorch's Unet comes within 2 % of {flops / 1e9:.3f} GFLOP")
    return Unet(dim, attn_dim_head=head), f"Unet({dim}, attn_dim_head={head})"


def lucidrains(setting: Setting, precision: str) -> Trainer:
    stand_in()
    from denoising_diffusion_pytorch import GaussianDiffusion
    from denoising_diffusion_pytorch import Trainer as TheirTrainer

    net, network = lucidrains_net(setting.flops, setting.dataset.resolution)
    flops = forward_flops(Unlabelled(net), setting.dataset.resolution)
    trainer = TheirTrainer(
        GaussianDiffusion(net, image_size=setting.dataset.resolution),
        str(setting.folder / "pictures"),
        train_batch_size=setting.recipe.batch_size,
        augment_horizontal_flip=False,
        amp=precision == "bf16",
        mixed_precision_type="bf16",
        calculate_fid=False,
        save_and_sample_every=10**9,
        results_folder=str(setting.folder / f"lucidrains-{precision}"),
    )

    def steps(count: int) -> None:
        trainer.train_num_steps = trainer.step + count
        trainer.train()

    return Trainer(Network(flops, network), steps, partial(trainer.save, 0), LUCIDRAINS_EVERY)


LUCIDRAINS = "denoising-diffusion-pytorch"
PEERS = ("diffusers", LUCIDRAINS)
SIDES = {  # name -> what makes it, its precision, what must be installed
    "ours": (ours, "", ()),
    "diffusers fp32": (diffusers, "fp32", ("diffusers", "accelerate")),
    "diffusers bf16": (diffusers, "bf16", ("diffusers", "accelerate")),
    f"{LUCIDRAINS} fp32": (lucidrains, "fp32", ("denoising_diffusion_pytorch",)),
    f"{LUCIDRAINS} bf16": (lucidrains, "bf16", ("denoising_diffusion_pytorch",)),
}


class Turn(NamedTuple):
    """Seconds of steps with their share of a checkpoint, by the clock and of processors (the loader's workers left out)."""

    wall: float
    cpu: float


def serve(name: str, setting: Setting, line: Connection) -> None:
    """A side's process: builds its trainer, tells its network, then takes as many steps as it is told, until told none."""
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115  bars of progress, for as long as the process lives
    multiprocessing.set_start_method("fork", force=True)  # of the loader's workers, as in a program of its own
    torch.set_num_threads(setting.threads)
    torch.manual_seed(0)
    make, precision, _ = SIDES[name]
    try:
        trainer = make(setting, precision)
        trainer.steps(2)  # to warm up
        line.send(trainer.network)
        while count := line.recv():
            started, used = finished(), time.process_time()
            trainer.steps(count)
            between, used_between = finished(), time.process_time()
            trainer.checkpoint()
            share = count / trainer.every
            wall = between - started + share * (finished() - between)
            line.send(Turn(wall, used_between - used + share * (time.process_time() - used_between)))
    except Exception as error:
        line.send(f"{type(error).__name__}: {error}")  # a third party's: it may not travel as it is
        raise


def hear(name: str, line: Connection) -> Any:
    """What a side's process answers.  Raises SystemExit with what it failed with."""
    try:
        answer = line.recv()
    except EOFError:
        answer = "its process has ended without a word, perhaps for want of memory"
    if isinstance(answer, str):
        raise SystemExit(f"{name}: {answer}")
    return answer


@contextmanager
def running(names: list[str], setting: Setting) -> Iterator[dict[str, Connection]]:
    """A process of each side, which has heard nothing yet."""
    context = multiprocessing.get_context("spawn")
    lines, processes = {}, []
    for name in names:
        lines[name], theirs = context.Pipe()
        processes.append(context.Process(target=serve, args=(name, setting, theirs)))
        processes[-1].start()
        theirs.close()
    try:
        yield lines
    finally:
        for line in lines.values():
            line.close()  # ends its process at the next word
        for process in processes:
            process.terminate()
            process.join()


def measured(setting: Setting, names: list[str], *, turns: int, steps: int) -> tuple[dict, dict]:
    """The network of each side, and its turns."""
    rows: dict[str, list[Turn]] = {name: [] for name in names}
    with running(names, setting) as lines:
        networks = {name: hear(name, line) for name, line in lines.items()}
        for turn in range(turns):
            for name in names[:: 1 if turn % 2 else -1]:
                lines[name].send(steps)
                rows[name].append(hear(name, lines[name]))
    return networks, rows


def settled(preset: str, folder: Path, threads: int) -> Setting:
    """The preset's pictures, once as a dataset and once as files."""
    recipe = PRESETS[preset]()
    dataset = shard_dataset("embedded", recipe.shard, folder / "data")
    reader = ShardReader(dataset.uri, digest=dataset.digest, captions=False)
    pictures = folder / "pictures"
    pictures.mkdir()
    for i in range(len(reader)):
        (pictures / f"{i}.png").write_bytes(encode_png(reader.read(i).image))
    side = dataset.resolution
    shape = {"resolution": side, "classes": len(dataset.classes), "sigma_data": recipe.train.sigma_data}
    flops = forward_flops(denoiser_of(recipe.train.unet, precision="fp32", **shape), side)
    return Setting(recipe.train, dataset, folder, tuple(reader.labels.tolist()), flops, threads)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="demo", choices=sorted(PRESETS))
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps of each side in a turn")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    names = []
    for name, (_, _, packages) in SIDES.items():
        if missing := [package for package in packages if importlib.util.find_spec(package) is None]:
            print(f"{name}: {', '.join(missing)} not installed")
        else:
            names.append(name)
    own = PRESETS[args.preset]().train.precision
    peak = {}
    for precision, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        peak[precision] = max(peaks(dtype, DEVICE, budget_s=1.0).values())
    with TemporaryDirectory(prefix="bench-") as folder:
        setting = settled(args.preset, Path(folder), args.threads)
        networks, rows = measured(setting, names, turns=args.turns, steps=args.steps)
    images = args.steps * setting.recipe.batch_size
    where = torch.cuda.get_device_name() if DEVICE == "cuda" else f"CPU, {args.threads} threads"
    print(
        f"{where}, torch {torch.__version__}, {args.preset}, batch {setting.recipe.batch_size}, {len(rows['ours'])} turns of"
        f" {args.steps} steps; peak bf16 {peak['bf16'] / 1e9:.0f} GFLOP/s, fp32 {peak['fp32'] / 1e9:.0f}"
    )
    for name, network in networks.items():
        rate = images / statistics.median(turn.wall for turn in rows[name])
        used = 3 * network.flops * rate  # backward is twice the forward
        share = used / peak[SIDES[name][1] or own]
        print(
            f"{name:<32} {rate:7.1f} images/s  {used / 1e9:6.1f} GFLOP/s  MFU {share:5.1%}  {network.name},"
            f" {network.flops / 1e9:.3f} GFLOP ({network.flops / setting.flops - 1:+.1%})"
        )
    limit, passed = LIMITS[DEVICE], True
    for peer in PEERS:
        theirs = [name for name in names if name.startswith(peer)]
        if theirs:
            best = min(theirs, key=lambda name: statistics.median(turn.wall for turn in rows[name]))
            pairs = list(zip(rows[best], rows["ours"], strict=True))
            walls = [other.wall / mine.wall for other, mine in pairs]
            ratio, by_cpu = statistics.median(walls), statistics.median(other.cpu / mine.cpu for other, mine in pairs)
            passed &= ratio >= limit
            print(
                f"ours over {best}: {ratio:.2f} ({min(walls):.2f} to {max(walls):.2f}; by processor time of the trainer"
                f" {by_cpu:.2f}); limit {limit}: {'passed' if ratio >= limit else 'FAILED'}"
            )
    raise SystemExit(not passed)


if __name__ == "__main__":
    from tests.benchmarks import bench_trainers  # under this name the sides' processes can import it

    bench_trainers.main()
