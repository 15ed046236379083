"""One process of a probe: `python -m diffusion.planning.trial FOLDER RANK`.  It trains a few steps of a recipe's network on
made-up pictures with the others, answers and extracts as an evaluation would, and says on standard output what that took.

What to do lies in FOLDER as `trial.json`, an `Asked`; there the processes find each other, too.
"""

import json
import sys
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from diffusion.evaluation.extractors.features import BATCH, extractor, find_weights
from diffusion.recipe import Frozen, Recipe
from diffusion.threads import one_thread
from diffusion.training.parallel import data_parallel, exact_parallel, world_gather
from diffusion.training.plan import inputs
from diffusion.training.step import TrainState, build_state, train_step

ASKED = "trial.json"
_WARM = 2  # steps that are not counted: the first compile and allocate
_LEAST, _MOST = 3, 24  # steps, answers
_STEP_FLOPS = 3e11  # of a step on a CPU; of a larger one a part is taken


class Asked(Frozen):
    """What a trial does."""

    recipe: Recipe
    resolution: int  # of the pictures
    classes: int
    world: int
    share: int  # pictures of a step on each process
    step_flops: float  # of them
    threads: int
    gpu: bool
    budget_s: float


class Told(NamedTuple):
    """Seconds."""

    ready: float  # by the system's monotonic clock
    step_s: list[float]
    answer_s: float  # of a row
    feature_s: float | None  # of a picture; None where there is no such network here
    core: float  # share of a processor that a busy thread had


class _Made(NamedTuple):
    """Pictures of noise, as a reader would give them."""

    images: Tensor
    label: Tensor
    captions: list[str]
    keys: list[str]
    index: Tensor
    latents: Tensor | None


def main() -> None:
    """Entry point of the process."""
    ready = time.monotonic()  # all is imported
    folder, rank = Path(sys.argv[1]), int(sys.argv[2])
    asked = Asked.model_validate_json((folder / ASKED).read_bytes())
    torch.set_num_threads(asked.threads)
    if asked.world > 1:
        dist.init_process_group(
            "nccl" if asked.gpu else "gloo",
            store=dist.FileStore(str(folder / "meeting"), asked.world),
            rank=rank,
            world_size=asked.world,
        )
    device = torch.device("cuda", rank) if asked.gpu else torch.device("cpu")
    if asked.gpu:
        torch.cuda.set_device(device)
    state, steps = trained(asked, device)
    answer_s, core = answered(asked, state, device)
    told = Told(ready, steps, answer_s, extracted(asked, str(device)), core)
    print(json.dumps(told._asdict()), flush=True)
    if asked.world > 1:
        dist.barrier()
        dist.destroy_process_group()


def trained(asked: Asked, device: torch.device) -> tuple[TrainState, list[float]]:
    """Steps, with the exchange between all processes.  Of one that a CPU takes long for, a part is computed, and its seconds
    are taken that many times."""
    recipe = asked.recipe.train
    state = build_state(recipe, resolution=asked.resolution, classes=asked.classes, device=device)
    side = asked.resolution // recipe.codec_factor
    exact = recipe.micro_batch is not None
    model = None if exact else data_parallel(state, side)
    add_up = exact_parallel(state, recipe) if exact else None
    rows = asked.share
    if not asked.gpu and not exact:
        rows = max(1, min(rows, int(rows * _STEP_FLOPS / asked.step_flops)))
    gather = world_gather()

    def step() -> float:
        batch = made(asked, rows, state.images_seen)
        began = time.perf_counter()
        train_step(state, batch, recipe, model=model, add_up=add_up)
        if asked.gpu:
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    for _ in range(_WARM):
        last = step()
    count = max(_LEAST, min(_MOST, int(asked.budget_s / max(gather(last)))))
    return state, [step() * asked.share / rows for _ in range(count)]


def made(asked: Asked, rows: int, start: int) -> _Made:
    """A batch."""
    recipe, side = asked.recipe.train, asked.resolution
    own = torch.Generator().manual_seed(start)
    images = torch.randint(0, 256, (rows, side, side, 3), dtype=torch.uint8, generator=own)
    latents = None
    if recipe.codec != "none":
        small = side // recipe.codec_factor
        latents = torch.rand((rows, 2, recipe.codec_channels, small, small), generator=own)
    label = torch.arange(rows) % asked.classes
    index = torch.arange(start, start + rows)
    captions = ["a picture of something"] * rows if recipe.text_encoder != "none" else [""] * rows
    return _Made(images.permute(0, 3, 1, 2), label, captions, [str(i) for i in range(rows)], index, latents)


def answered(asked: Asked, state: TrainState, device: torch.device) -> tuple[float, float]:
    """Seconds of a row, as an evaluation asks for them, in one thread; and the share of a processor that this had."""
    recipe = asked.recipe.train
    side, net = asked.resolution // recipe.codec_factor, state.net
    rows = min(64, 2 * asked.recipe.evaluate.batch_size)
    if not asked.gpu:
        rows = max(2, min(rows, int(_STEP_FLOPS * asked.share / asked.step_flops)))
    given = inputs(net, (rows, recipe.codec_channels, side, side), recipe.text_tokens)
    given = {name: value.to(device) for name, value in given.items()}
    net.eval()
    times: list[float] = []
    with one_thread(), torch.no_grad():
        net(**given)
        wall, busy = time.perf_counter(), time.process_time()
        while len(times) < _LEAST or (len(times) < _MOST and time.perf_counter() - wall < asked.budget_s / 2):
            began = time.perf_counter()
            net(**given)
            if asked.gpu:
                torch.cuda.synchronize(device)
            times.append((time.perf_counter() - began) / rows)
    wall, busy = time.perf_counter() - wall, time.process_time() - busy
    return sum(times) / len(times), 1.0 if asked.gpu else max(0.05, min(1.0, busy / wall))


def extracted(asked: Asked, device: str) -> float | None:
    """Seconds of a picture in the extractor, in one thread."""
    recipe = asked.recipe.evaluate
    try:
        weights = None if recipe.extractor == "efficientnet-lite0" else find_weights(recipe.extractor)
        network = extractor(recipe.extractor, resolution=recipe.extractor_resolution, weights=weights, device=device)
    except (ValueError, OSError, ImportError):
        return None
    pictures = torch.zeros(BATCH, asked.resolution, asked.resolution, 3, dtype=torch.uint8)
    with one_thread():
        network(pictures)
        times = []
        for _ in range(_LEAST):
            began = time.perf_counter()
            network(pictures)
            times.append((time.perf_counter() - began) / BATCH)
    return median(times)


if __name__ == "__main__":
    main()
