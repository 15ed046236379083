"""Our train step against diffusers' U-Net of equal FLOPs, on the same batch, interleaved, best settings of each.

    python -m tests.benchmarks.bench_train_step

Both sides do the same work: noise, preconditioning, forward, loss, backward, gradient clip, fused AdamW.  Only the network
differs.  Settings tried for each: float32 and bf16 autocast, contiguous and channels_last; the fastest counts.
Limit: ours at least 1.5 times the images/s on a CPU, and the counter-based random numbers at most 3 % of our step.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from diffusion.denoiser import EDM, Denoiser, c_noise, denoised_of, denoiser_of
from diffusion.loss import denoising_loss, edm_weight
from diffusion.peak import peaks
from diffusion.presets import PRESETS
from diffusion.random import Stream, normal, uniform
from diffusion.schedule import log_normal_sigma

LIMIT = 1.5
RANDOM_LIMIT = 0.03
RANDOM = "random numbers alone"


class Peer(nn.Module):
    """diffusers' UNet2DModel behind the same preconditioning and the same signature."""

    def __init__(self, net: nn.Module, precision: str, layout: torch.memory_format) -> None:
        super().__init__()
        self.net, self.precond, self.precision = net.to(memory_format=layout), EDM(), precision
        self.layout = layout

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            scaled = (self.precond.c_in(sigma.view(-1, 1, 1, 1)) * x).contiguous(memory_format=self.layout)
            raw = self.net(scaled, c_noise(sigma), class_labels=label).sample
        return denoised_of(raw.float(), x, sigma, self.precond)


def forward_flops(net: nn.Module, resolution: int) -> int:
    """FLOPs (2 per multiply-add) of one picture, by torch's counter."""
    device = next(net.parameters()).device
    x, one = torch.zeros(1, 3, resolution, resolution, device=device), torch.ones(1, device=device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(x, one, label=one.long())
    return counter.get_total_flops()


def peer_net(flops: int, resolution: int, classes: int, levels: int) -> nn.Module:
    """UNet2DModel with this many levels (attention at the lowest), its width searched until its FLOPs are within 2 %."""
    from diffusers import UNet2DModel

    def build(widths: tuple[int, ...]) -> nn.Module:
        return UNet2DModel(
            sample_size=resolution,
            layers_per_block=1,
            block_out_channels=widths,
            down_block_types=("DownBlock2D",) * (levels - 1) + ("AttnDownBlock2D",),
            up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * (levels - 1),
            norm_num_groups=4,
            attention_head_dim=8,
            num_class_embeds=classes + 1,
        )

    def error(widths: tuple[int, ...]) -> float:
        return forward_flops(Peer(build(widths), "fp32", torch.contiguous_format), resolution) / flops - 1

    widths = [16] + [32] * (levels - 1)
    while error(tuple(widths)) < -0.02:  # widen the narrowest level relative to a doubling, by one group at a time
        i = min(range(levels), key=lambda i: widths[i] / min(2**i, 4))
        widths[i] += 8
    for i in (levels - 1, 1, 0):
        while error(tuple(widths)) > 0.02 and widths[i] > 8:
            widths[i] -= 4
    if abs(error(tuple(widths))) > 0.02:
        raise SystemExit(f"no width of UNet2DModel comes within 2 % of {flops / 1e9:.3f} GFLOP; nearest {widths}")
    return build(tuple(widths))


def stepper(denoiser: nn.Module, batch: tuple[torch.Tensor, ...]) -> Callable[[], float]:
    """One optimizer step; returns its seconds."""
    x0, label, index = batch
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=1e-4, fused=True)

    def step() -> float:
        start = time.perf_counter()
        sigma, noise = drawn(x0, index)
        weight = partial(edm_weight, sigma_data=0.5)
        loss = denoising_loss(denoiser, weight, x0, noise, sigma, {"label": label}).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
        optimizer.step()
        return finished(x0, start)

    return step


def drawing(batch: tuple[torch.Tensor, ...]) -> Callable[[], float]:
    """The part of a step that `random.py` takes; returns its seconds."""
    x0, _, index = batch

    def draw() -> float:
        start = time.perf_counter()
        drawn(x0, index)
        return finished(x0, start)

    return draw


def drawn(x0: torch.Tensor, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise levels and noise of a batch."""
    sigma = log_normal_sigma(uniform(0, Stream.SIGMA, index), mean=-1.2, std=1.2)
    return sigma, normal(0, Stream.NOISE, index, tuple(x0.shape[1:]))


def finished(x0: torch.Tensor, start: float) -> float:
    """Seconds since `start`, when the device has done what was asked."""
    if x0.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="demo", choices=sorted(PRESETS))
    parser.add_argument("--batch", type=int, help="pictures per step (default: the recipe's)")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    recipe = PRESETS[args.preset]()
    resolution, train, classes = recipe.shard.resolution, recipe.train, 9
    size = args.batch or train.batch_size
    index = torch.arange(size, device=device)
    batch = (torch.rand(size, 3, resolution, resolution, device=device) * 2 - 1, index % classes, index)

    def ours(precision: str) -> Denoiser:
        shape = {"resolution": resolution, "classes": classes, "sigma_data": train.sigma_data}
        return denoiser_of(train.unet, precision=precision, **shape).to(device)

    flops = forward_flops(ours("fp32"), resolution)
    net = peer_net(flops, resolution, classes, levels=4)
    peer_flops = forward_flops(Peer(net, "fp32", torch.contiguous_format), resolution)
    widths = tuple(net.config.block_out_channels)
    sides = {f"ours {precision}": stepper(ours(precision), batch) for precision in ("bf16", "fp32")}
    for layout in (torch.channels_last, torch.contiguous_format):
        for precision in ("bf16", "fp32"):
            name = f"diffusers {precision} {'channels_last' if layout is torch.channels_last else 'contiguous'}"
            sides[name] = stepper(Peer(peer_net_copy(net), precision, layout).to(device), batch)
    sides[RANDOM] = drawing(batch)
    times: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(args.rounds + 1):
        for name, step in sides.items():
            seconds = step()
            if i:  # the first round warms up
                times[name].append(seconds)

    peak = {
        name: peaks(dtype, device, budget_s=1.0) for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32))
    }
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {args.threads} threads"
    print(
        f"{where}, torch {torch.__version__}, batch {size}, {resolution} x {resolution}, median of {args.rounds} rounds"
    )
    for name, peak_of in peak.items():
        print(
            f"peak {name}: convolution {peak_of['conv'] / 1e9:.0f} GFLOP/s, matmul {peak_of['matmul'] / 1e9:.0f} GFLOP/s"
        )
    print(
        f"ours {flops / 1e9:.3f} GFLOP forward; diffusers {widths} {peer_flops / 1e9:.3f} ({peer_flops / flops - 1:+.1%})"
    )
    random_s = statistics.median(times.pop(RANDOM))
    best: dict[str, float] = {}
    for name, values in times.items():
        rate = size / statistics.median(values)
        used = 3 * (flops if name.startswith("ours") else peer_flops) * rate  # backward is twice the forward
        top = peak["bf16" if "bf16" in name else "fp32"]
        print(
            f"{name:32s} {rate:8.1f} img/s {used / 1e9:8.1f} GFLOP/s"
            f"  {used / top['conv']:5.1%} of conv peak  {used / top['matmul']:5.1%} of matmul peak"
        )
        side = name.split()[0]
        best[side] = max(best.get(side, 0.0), rate)
    print(f"ratio ours / diffusers, best of each: {best['ours'] / best['diffusers']:.2f} (limit {LIMIT})")
    share = random_s * best["ours"] / size
    print(f"{RANDOM}: {random_s * 1e3:.1f} ms, {share:.1%} of our best step (limit {RANDOM_LIMIT:.0%})")


def peer_net_copy(net: nn.Module) -> nn.Module:
    """A fresh network of the same configuration."""
    return type(net)(**{k: v for k, v in net.config.items() if not k.startswith("_")})


if __name__ == "__main__":
    main()
