"""The sides of `bench_trainers`: ours, diffusers' script, and denoising-diffusion-pytorch, each as its process runs it."""

import importlib.util
import sys
import time
import types
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset

from diffusion.data.reader import ShardReader
from diffusion.data.reading_order import order_of
from diffusion.data.stream import batches
from diffusion.recipe import TrainRecipe
from diffusion.store.refs import DatasetRef
from diffusion.training import checkpoint
from diffusion.training.figures import Figures
from diffusion.training.loop import alone, ignore, metrics_images_of, train
from diffusion.training.saving import Saving
from diffusion.training.step import build_state
from tests.benchmarks import diffusers_script
from tests.benchmarks.bench_train_step import Peer, forward_flops, peer_net

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
