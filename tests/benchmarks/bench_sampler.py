"""What a sampler costs beside its network, ours and diffusers': `python -m tests.benchmarks.bench_sampler`.

Trajectories take turns on one U-Net, the preset's, whose calls are timed from inside:

bare       as many network calls in a loop, on a fixed picture and noise level
ours       the conversation, its condition and guidance of scale 1 around it, and the driver `run`
diffusers  the loop of its pipelines: scale_model_input, network, scheduler.step

The ratio is a trajectory's CPU time over that of its own network calls, so neither other processes nor the network's
scatter enter; on a GPU, where the network runs beside the CPU, it is the wall clock's.  Limit: ours at most 1.03 at batch
1 and 16.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from diffusion.denoiser import Denoiser, denoiser_of
from diffusion.guidance import classifier_free
from diffusion.presets import PRESETS
from diffusion.sampler import SAMPLERS, evaluations, run
from diffusion.schedule import karras_sigmas

LIMIT = 1.03
PEERS = {
    "ddim": ("DDIMScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "ddpm_beta": ("DDPMScheduler", {"variance_type": "fixed_large"}),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
}


class Timed:
    """A denoiser that adds up the seconds of its calls."""

    def __init__(self, denoiser: Denoiser, clock: Callable[[], float]) -> None:
        self.denoiser, self.clock, self.seconds, self.calls = denoiser, clock, 0.0, 0

    def __call__(self, x: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
        start = self.clock()
        denoised = self.denoiser(x, sigma, label)
        self.seconds += self.clock() - start
        self.calls += 1
        return denoised


def clock_of(device: str) -> Callable[[], float]:
    def synchronized() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return time.process_time if device == "cpu" else synchronized


def trajectories(timed: Timed, batch: int, resolution: int, steps: int, device: str) -> dict[str, Callable[[], None]]:
    """Name -> one trajectory from noise to pictures."""
    sigmas = karras_sigmas(steps, sigma_min=0.1, sigma_max=80.0)
    x = torch.randn(batch, 3, resolution, resolution, device=device)
    label, sigma = torch.zeros(batch, dtype=torch.int64, device=device), torch.ones(batch, device=device)

    def noise(_: int) -> Tensor:
        return torch.randn(x.shape, device=device)

    def bare() -> None:
        for _ in range(steps):
            timed(x, sigma, label)

    def ours(name: str) -> Callable[[], None]:
        cond = {"label": label}
        return lambda: run(classifier_free(SAMPLERS[name](80 * x, sigmas, noise), cond, cond, 1.0), timed)

    def theirs(kind: str, config: dict) -> Callable[[], None]:
        import diffusers

        scheduler = getattr(diffusers, kind)(prediction_type="sample", **config)

        def trajectory() -> None:
            scheduler.set_timesteps(steps, device=device)
            sample = x
            for t in scheduler.timesteps:
                denoised = timed(scheduler.scale_model_input(sample, t), sigma, label)
                sample = scheduler.step(denoised, t, sample, return_dict=False)[0]

        return trajectory

    sides = {"bare": bare} | {f"ours {name}": ours(name) for name in SAMPLERS}
    return sides | {f"diffusers {name}": theirs(*peer) for name, peer in PEERS.items()}


@torch.no_grad()
def ratios(timed: Timed, sides: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """All seconds over the network's seconds, of each trajectory of each side."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(rounds + 1):
        for name, trajectory in sides.items():
            timed.seconds, start = 0.0, timed.clock()
            trajectory()
            if i:  # the first round warms up
                found[name].append((timed.clock() - start) / timed.seconds)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="demo")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    recipe = PRESETS[options.preset]()
    train, resolution = recipe.train, recipe.shard.resolution
    shape = {"resolution": resolution, "classes": 9, "sigma_data": train.sigma_data, "precision": train.precision}
    timed = Timed(denoiser_of(train.unet, **shape).to(device).eval(), clock_of(device))
    worst = 0.0
    for batch in (1, 16):
        sides = trajectories(timed, batch, resolution, options.steps, device)
        found = {name: statistics.median(values) for name, values in ratios(timed, sides, options.rounds).items()}
        timed.seconds, timed.calls = 0.0, 0
        sides["bare"]()
        print(
            f"\n{options.preset}, batch {batch}, {options.threads} threads, {options.steps} steps, medians of"
            f" {options.rounds}: bare {found['bare']:.4f}, {1e3 * timed.seconds / timed.calls:.1f} ms a call"
        )
        for name in SAMPLERS:
            peer = found.get(f"diffusers {name}")
            calls = evaluations(name, options.steps)
            print(
                f"{name:14s} {calls:3d} calls   ours {found[f'ours {name}']:.4f}   "
                f"diffusers {f'{peer:.4f}' if peer else '-'}"
            )
            worst = max(worst, found[f"ours {name}"])
    print(f"\nworst of ours {worst:.4f}; limit {LIMIT}: {'passed' if worst <= LIMIT else 'FAILED'}")
    raise SystemExit(worst > LIMIT)


if __name__ == "__main__":
    main()
