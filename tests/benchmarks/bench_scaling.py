"""How training scales, by simulation: `python -m tests.benchmarks.bench_scaling`.

First the simulation is held against what can be had here: two processes on this machine, each with one thread.  Measured
are the step of each without the other (both compute, nothing is exchanged), an all-reduce's latency and bandwidth, and, in
turns with these, the real data-parallel step, which the simulation must foretell from the others within 10 %.

Then it is asked for clusters that are not here, with assumptions in place of measurements, which are printed: the share of
the peak that the network reaches, the time to launch a kernel, the links.  A step of one worker is

  forward | backward, of which each bucket of gradients is exchanged as soon as it is there | rest of the exchange
  | the worker's share of Muon's matrices | exchange of the weights | averages and the rest

and all workers wait for the slowest in each exchange: their times vary.  [Li et al. 2020, "PyTorch Distributed", Sec. 3.2]
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from diffusion.denoiser import Denoiser
from diffusion.presets import PRESETS
from diffusion.recipe import Recipe
from diffusion.training.optimizer import cost_of, hidden_matrices
from diffusion.training.parallel import data_parallel
from diffusion.training.plan import Plan, plan_of
from diffusion.training.step import TrainState, build_state, net_of, train_step
from tests.random_batch import random_batch

LIMIT = 0.1  # of the measured step, by which the simulated one may miss it
FIRST_BUCKET, BUCKET = 2**20, 25 * 2**20  # bytes of gradients that DistributedDataParallel exchanges together
TRIALS = 200
NEWTON_SCHULZ = 5  # iterations of Muon
LARGE = 2**24  # bytes of the all-reduce by which the bandwidth is measured


@dataclass(frozen=True)
class Step:
    """Seconds of one worker's step, and bytes that it exchanges."""

    forward: float
    backward: float
    matrices: float  # Muon's work on all matrices, which the workers divide
    rest: float
    gradients: int
    updates: int
    variation: float  # standard deviation over the mean, of a worker's times from step to step


@dataclass(frozen=True)
class Links:
    """Nodes of `size` workers.  Bandwidths are those of an all-reduce's bytes in and out of one worker."""

    size: int
    inside: float  # bytes/s between workers of a node
    between: float  # bytes/s of one worker to other nodes, all of a node's at once
    latency: float  # seconds of a message

    def all_reduce(self, size: int, world: int) -> float:
        """Seconds: reduced and scattered within nodes, then around the nodes, then gathered within nodes."""
        here = min(self.size, world)
        nodes = world / here
        within = 2 * (here - 1) / here * size / self.inside + 2 * (here - 1) * self.latency
        return within + (2 * (nodes - 1) / nodes * size / here / self.between + 2 * np.log2(nodes) * self.latency)

    def broadcast(self, size: int, world: int) -> float:
        """Seconds in which each worker gets the parts of all others, of `size` bytes together."""
        slowest = self.inside if world <= self.size else min(self.inside, self.between * self.size)
        return (world - 1) / world * size / slowest + np.log2(max(world, 2)) * self.latency


def simulated(step: Step, links: Links, world: int) -> dict[str, float]:
    """Mean seconds of a step by what they are spent on."""
    random = np.random.default_rng(0)
    slow = 1 + step.variation * random.standard_normal((TRIALS, world)).max(axis=1)  # the slowest of the workers
    buckets = [min(FIRST_BUCKET, step.gradients)]
    while sum(buckets) < step.gradients:
        buckets.append(min(BUCKET, step.gradients - sum(buckets)))
    free = 0.0
    for ready in np.cumsum(buckets) / step.gradients:  # the last bucket is there at the end of the backward pass
        size = buckets[0]
        buckets = [*buckets[1:], size]
        start = max(free, step.forward + step.backward * ready)
        free = start + links.all_reduce(size, world) if world > 1 else start
    computed = step.forward + step.backward
    return {
        "network": computed,
        "slowest": float(computed * (slow.mean() - 1)),
        "gradients": max(0.0, free - computed),
        "matrices": step.matrices / world,
        "weights": links.broadcast(step.updates, world) if world > 1 and step.updates else 0.0,
        "rest": step.rest,
    }


def process(rank: int, folder: str, preset: str, share: int, rounds: int) -> None:
    """One of two processes that measure; rank 0 leaves what it found in `folder`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    recipe = PRESETS[preset]()
    train = recipe.train.model_copy(update={"batch_size": 2 * share})
    side = recipe.shard.resolution
    alone, together = (build_state(train, resolution=side, classes=9, device="cpu") for _ in range(2))
    model = data_parallel(together, side)
    batch = random_batch(rank * share, share, side=side, classes=9)

    def took(call: Callable[[], object]) -> float:
        dist.barrier()
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    small, large = torch.zeros(1), torch.zeros(LARGE // 4)
    calls = {
        "local": lambda: train_step(alone, batch, train),
        "forward": lambda: alone.net(torch.zeros(share, 3, side, side), torch.ones(share)),
        "matrices": lambda: optimizer_of_matrices(alone).step(),
        "small": lambda: dist.all_reduce(small),
        "large": lambda: dist.all_reduce(large),
        "real": lambda: train_step(together, batch, train, model=model),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 2):
        for name, call in calls.items():
            seconds = took(call)
            if turn >= 2:
                times[name].append(seconds)
    everyone: list[dict] = [{}, {}]
    dist.all_gather_object(everyone, times)
    if rank == 0:
        torch.save(everyone, Path(folder, "times.pt"))
    dist.destroy_process_group()


def optimizer_of_matrices(state: TrainState) -> torch.optim.Optimizer:
    return state.optimizer.parts[-1]


def against_two_processes(preset: str, share: int, rounds: int) -> bool:
    """Print what was measured and what was foretold.  Returns whether they agree."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        torch.multiprocessing.spawn(process, (folder, preset, share, rounds), nprocs=2)
        measured = torch.load(Path(folder, "times.pt"), weights_only=True)
    middle = {
        name: statistics.median(map(max, zip(*(times[name] for times in measured), strict=True)))
        for name in measured[0]
    }
    local = measured[0]["local"] + measured[1]["local"]
    recipe = PRESETS[preset]()
    plan = plan_of(
        recipe.train.model_copy(update={"batch_size": 2 * share}), side=recipe.shard.resolution, classes=9, world=2
    )
    network = statistics.median(local) - middle["matrices"]
    step = Step(
        forward=network / 3,
        backward=network * 2 / 3,
        matrices=middle["matrices"],
        rest=0.0,  # it is in the network's here
        gradients=plan.gradient_bytes,
        updates=plan.update_bytes,
        variation=statistics.stdev(local) / statistics.mean(local),
    )
    latency = middle["small"] / 2
    links = Links(2, LARGE / (middle["large"] - middle["small"]), 1.0, latency)
    parts = simulated(step, links, 2)
    foretold = sum(parts.values())
    print(f"two processes here, {share} pictures each, medians of {rounds} turns")
    print(
        f"  a step without the other {middle['local'] * 1e3:7.1f} ms, of it Muon's matrices {middle['matrices'] * 1e3:.1f}"
    )
    print(f"  all-reduce: latency {latency * 1e6:.0f} us, {links.inside / 1e9:.2f} GB/s")
    print(f"  measured together {middle['real'] * 1e3:7.1f} ms; foretold {foretold * 1e3:7.1f} ({told(parts)})")
    off = foretold / middle["real"] - 1
    print(f"  foretold over measured {1 + off:.3f} (limit 1 +- {LIMIT}): {'good' if abs(off) <= LIMIT else 'MISSED'}")
    return abs(off) <= LIMIT


class Kernels(TorchDispatchMode):
    """Counts the operations that would each be a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not any(word in str(function) for word in ("view", "detach", "alias", "t.default", "expand"))
        return function(*args, **(kwargs or {}))


def kernels_of(net: Denoiser, side: int) -> int:
    """Operations of a forward and a backward pass."""
    with Kernels() as counted:
        net(torch.zeros(1, net.net.picture_channels, side, side), torch.ones(1)).sum().backward()
    return counted.count


@dataclass(frozen=True)
class Gpu:
    """Assumptions."""

    peak: float = 989e12  # FLOP/s in bf16, an H100's [NVIDIA's data sheet]
    share: float = 0.4  # of it that large convolutions reach in our network
    matrix_share: float = 0.3
    memory: float = 3.35e12  # bytes/s
    launch: float = 5e-6  # seconds a kernel, without CUDA graphs
    variation: float = 0.01


def step_on(gpu: Gpu, recipe: Recipe, plan: Plan, kernels: int, matrices: float) -> Step:
    """A step of a worker on a GPU.  matrices: FLOPs of Muon."""
    network = max(plan.flops / (gpu.share * gpu.peak), kernels * gpu.launch)
    kept = plan.memory
    moved = 3 * (kept.weights + kept.optimizer) + 2 * kept.averages + 2 * kept.weights  # read and written once
    return Step(
        forward=network / 3,
        backward=network * 2 / 3,
        matrices=matrices / (gpu.matrix_share * gpu.peak),
        rest=moved / gpu.memory,
        gradients=plan.memory.gradients,
        updates=plan.memory.weights if recipe.train.optimizer == "muon" else 0,
        variation=gpu.variation,
    )


def on_paper(preset: str, gpu: Gpu, links: Links) -> None:
    """A table for the recipe's own batch, and one for a batch that grows with the workers."""
    recipe = PRESETS[preset]()
    side = recipe.shard.resolution // recipe.train.codec_factor
    plain = recipe.train.model_copy(update={"precision": "fp32"})  # no casts among the kernels
    net = net_of(plain, side=side, classes=1000)
    kernels, muon = kernels_of(net, side), hidden_matrices(net)
    flops = 2 * NEWTON_SCHULZ * sum(cost_of(weight) for weight in muon)
    millions = sum(parameter.numel() for parameter in net.parameters()) / 1e6
    print(f"\n{preset}: {millions:.0f} M parameters, {kernels:,} kernels a step, Muon {flops / 1e12:.2f} TFLOP")
    own = recipe.train.batch_size
    for title, batch_of in (
        (f"the recipe's batch of {own:,}", lambda world: own),
        ("256 pictures a worker", lambda world: 256 * world),
    ):
        print(f"  {title}")
        base = None
        for world in (1, 8, 64, 512):
            train = recipe.train.model_copy(update={"batch_size": batch_of(world)})
            plan = plan_of(train, side=side, classes=1000, world=world)
            step = step_on(gpu, recipe, plan, kernels, flops)
            parts = simulated(step, links, world)
            rate = train.batch_size / sum(parts.values())
            base = base or rate
            bound = "launches" if plan.flops / (gpu.share * gpu.peak) < kernels * gpu.launch else "compute"
            print(
                f"    {world:4d} GPUs {rate:10,.0f} images/s, {rate / base / world:4.0%} of {world} x one;"
                f" {1e3 * sum(parts.values()):7.1f} ms: {told(parts)}; network by {bound}"
            )


def told(parts: dict[str, float]) -> str:
    total = sum(parts.values())
    return ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in parts.items() if seconds / total >= 0.005)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="demo", choices=sorted(PRESETS), help="of the measurement here")
    parser.add_argument("--share", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=12)
    options = parser.parse_args()
    good = against_two_processes(options.preset, options.share, options.rounds)
    gpu, links = Gpu(), Links(size=8, inside=360e9, between=45e9, latency=10e-6)
    print(f"\non paper, with {gpu} and {links}")
    for preset in ("imagenet64", "latent256", "cifar10"):
        on_paper(preset, gpu, links)
    print("\nwith CUDA graphs (1 us a kernel)")
    on_paper("imagenet64", replace(gpu, launch=1e-6), links)
    raise SystemExit(0 if good else 1)


if __name__ == "__main__":
    main()
