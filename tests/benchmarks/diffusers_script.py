"""The loop of diffusers' `examples/unconditional_image_generation/train_unconditional.py`, from its documented defaults.

Linear betas over 1,000 steps, the mean squared error of epsilon, AdamW (1e-4, betas 0.95 and 0.999, weight decay 1e-6), a
cosine schedule after a warm-up, gradients clipped to 1, `EMAModel` (inverse gamma 1, power 3/4, at most 0.9999), a
`DataLoader` that shuffles each epoch.  What differs: classes, which the script has none of, and of whose labels a share may
be dropped; no mirrored pictures; the last, smaller batch of an epoch is left out.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from diffusion.data.images import to_uint8

LEARNING_RATE = 1e-4
WARMUP_STEPS = 500
CHECKPOINT_STEPS = 500


@dataclass
class Script:
    """What the script's loop moves.  net: UNet2DModel with classes, of which the last is the null label."""

    net: nn.Module
    optimizer: Any
    schedule: Any
    average: Any  # EMAModel
    scheduler: Any  # DDPMScheduler
    accelerator: Any  # of the package accelerate; None: without, which in float32 on one process is the same

    @property
    def null_label(self) -> int:
        return self.net.config.num_class_embeds - 1


def script_of(
    net: nn.Module, *, steps: int, lr: float = LEARNING_RATE, warmup_steps: int = WARMUP_STEPS, accelerator: Any = None
) -> Script:
    """The state before the first of `steps` steps."""
    from diffusers import DDPMScheduler
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel

    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=warmup_steps, num_training_steps=steps)
    average = EMAModel(net.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    if accelerator:
        net, optimizer, schedule = accelerator.prepare(net, optimizer, schedule)
    scheduler = DDPMScheduler(num_train_timesteps=1_000, beta_schedule="linear")
    return Script(net.train(), optimizer, schedule, average, scheduler, accelerator)


def endless(loader: DataLoader) -> Iterator[tuple[Tensor, Tensor]]:
    """Its batches, epoch after epoch."""
    for _ in count():
        yield from loader


def step(script: Script, x0: Tensor, label: Tensor, *, label_drop: float = 0.0) -> float:
    """One step on pictures (B, 3, H, W) in [-1, 1] of these classes (B,), drawing from torch's own generator.  Returns the
    loss, which the script reads at every step to log it."""
    noise, device = torch.randn_like(x0), x0.device
    t = torch.randint(0, script.scheduler.config.num_train_timesteps, (len(x0),), device=device)
    x = script.scheduler.add_noise(x0, noise, t)
    if label_drop:
        label = torch.where(torch.rand(len(label), device=device) < label_drop, script.null_label, label)
    loss = F.mse_loss(script.net(x, t, class_labels=label).sample.float(), noise)
    by = script.accelerator
    (by.backward if by else torch.Tensor.backward)(loss)
    (by if by else nn.utils).clip_grad_norm_(script.net.parameters(), 1.0)
    script.optimizer.step()
    script.schedule.step()
    script.optimizer.zero_grad()
    script.average.step(script.net.parameters())
    return loss.item()


@torch.no_grad()
def draw(
    net: nn.Module, label: Tensor, *, steps: int, guidance: float, seed: int, batch_size: int, side: int
) -> Tensor:
    """Pictures of these classes (N,), by the `DDIMScheduler` that is made of the script's `DDPMScheduler`.  guidance:
    classifier-free; 1: none, and half of the evaluations.  Returns uint8 (N, H, W, 3)."""
    from diffusers import DDIMScheduler, DDPMScheduler

    scheduler = DDIMScheduler.from_config(DDPMScheduler(num_train_timesteps=1_000, beta_schedule="linear").config)
    scheduler.set_timesteps(steps)
    device, null = label.device, net.config.num_class_embeds - 1
    noise = torch.randn((len(label), 3, side, side), generator=torch.Generator().manual_seed(seed)).to(device)
    pictures = []
    for x, own in zip(noise.split(batch_size), label.split(batch_size), strict=True):
        for t in scheduler.timesteps:
            epsilon = net(x, t, class_labels=own).sample
            if guidance != 1:
                worse = net(x, t, class_labels=torch.full_like(own, null)).sample
                epsilon = worse + guidance * (epsilon - worse)
            x = scheduler.step(epsilon, t, x).prev_sample
        pictures.append(to_uint8(x).cpu())
    return torch.cat(pictures)
