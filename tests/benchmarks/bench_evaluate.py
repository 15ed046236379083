"""What an evaluation spends outside the networks, and the memory it takes: `python -m tests.benchmarks.bench_evaluate`.

Time: `--share` pictures of 32 px are drawn by the network of the preset `--network`, guided and in 24 steps, and measured in
all ways against as many made training pictures (emoji, turned in hue, shifted and mirrored).  The share of the processor's
time spent in the calls of the denoiser and of the feature extractor, in one process of one thread, should be 90 % or more.
`--profile` lists what takes the rest by function, and adds to it.  All pairs of up to 10,000 pictures are compared, so that
with a network as small as the demo's the share falls with more pictures: of three counts or more that of 10,000 is also
reckoned, the networks' time by a straight line, the rest by a parabola.

Memory: for each of `--memory`, that many pictures are drawn by a small network in 2 unguided steps and measured against as
many, in a process of its own, driver and worker in one.  What counts is the most anonymous memory (RssAnon) at any time,
less that of `--memory`'s first: features lie in files, whose pages the system takes back when it needs them.
"""

import argparse
import cProfile
import json
import pstats
import re
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch

from diffusion.data.images import encode_png, fit, load
from diffusion.denoiser import Denoiser
from diffusion.evaluation.extractors.features import Extractor
from diffusion.evaluation.measure import evaluate
from diffusion.presets import PRESETS, demo
from diffusion.recipe import EvaluateRecipe, Recipe, SamplingRecipe, ShardRecipe, UNetRecipe
from diffusion.store.refs import RunRef
from tests.evaluated_run import make_run

EMOJI = Path(__file__).parents[2] / "diffusion" / "data" / "embedded" / "noto-emoji-64.zip"
SIDE = 32
SHARE = 0.9
WANTED = 10_000  # pictures of which it is the limit
GROWTH_MIB = 64.0
WIDTH, STEPS = UNetRecipe(channels=16, multipliers=(1, 2), blocks=(1, 1), attention=()), 2  # of the small network


def pictures(path: Path, count: int) -> None:
    """A zip of made pictures in four classes."""
    with zipfile.ZipFile(EMOJI) as source:
        names = [name for name in source.namelist() if name.endswith(".png")][:2_000]
        seeds = [fit(load(source.read(name)), size=(SIDE, SIDE), background="#ffffff") for name in names]
    random = np.random.default_rng(0)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for i in range(count):
            picture = 255.0 - seeds[i % len(seeds)]
            turned = picture @ np.abs(np.eye(3) + random.normal(0, 0.2, (3, 3)))
            moved = np.roll(turned, random.integers(-4, 5, 2), axis=(0, 1))[:, :: random.choice([-1, 1])]
            png = encode_png((255 - moved.clip(0, 255)).round().astype(np.uint8))
            archive.writestr(f"class-{i % 4}/{i:06d}.png", png)


def recipe_of(samples: int, network: str) -> Recipe:
    """network: name of the preset that has it, or "small"."""
    line, small = demo(), network == "small"
    unet = WIDTH if small else PRESETS[network]().train.unet
    train = line.train.model_copy(update={"images": 64, "checkpoint_images": 64, "unet": unet})
    sampling = SamplingRecipe(sampler="ddim", steps=STEPS, guidance=1.0) if small else line.evaluate.sampling
    changes = {"samples": samples, "batch_size": 128 if small else 32, "sampling": sampling}
    changes |= {"extractor_resolution": SIDE} if small else {}
    evaluated = EvaluateRecipe(**dict(line.evaluate) | changes)
    shard = ShardRecipe(resolution=SIDE, holdout=0.02, shard_size=1_024)
    return line.model_copy(update={"shard": shard, "train": train, "evaluate": evaluated})


class Timed:
    """Processor seconds within some functions, those that one calls from another counted once."""

    def __init__(self) -> None:
        self.seconds, self.inside = 0.0, False

    def around(self, function: Callable) -> Callable:
        def timed(*args: object, **kwargs: object) -> object:
            if self.inside:
                return function(*args, **kwargs)
            self.inside, started = True, time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.inside = False
                self.seconds += time.process_time() - started

        return timed


def share(count: int, folder: Path, network: str, *, profiled: bool) -> tuple[float, float]:
    """Seconds of the processor in the networks, and outside them."""
    folder.mkdir()
    run, recipe = made(folder, count, network)
    timed, plain = Timed(), (Denoiser.forward, Extractor.__call__)
    Denoiser.forward, Extractor.__call__ = (timed.around(each) for each in plain)
    profile, started = cProfile.Profile(time.process_time), time.process_time()
    with profile if profiled else nullcontext():
        evaluate(run, recipe, folder / "evaluated")
    total = time.process_time() - started
    Denoiser.forward, Extractor.__call__ = plain
    if profiled:
        pstats.Stats(profile).sort_stats("tottime").print_stats(30)
    said(f"{count:,} pictures by the network of {network}", timed.seconds, total - timed.seconds)
    return timed.seconds, total - timed.seconds


def said(what: str, inside: float, outside: float) -> bool:
    """Whether the share is kept, printed."""
    part = inside / (inside + outside)
    print(
        f"{what}: {inside + outside:.0f} s of the processor, {outside:.1f} of them outside the networks, {part:.1%} inside"
        f" (limit {SHARE:.0%}): {'kept' if part >= SHARE else 'MISSED'}",
        flush=True,
    )
    return part >= SHARE


def shares(counts: list[int], folder: Path, network: str, *, profiled: bool) -> bool:
    """Of each count, and of WANTED reckoned from three counts or more."""
    found = [share(count, folder / f"share-{count}", network, profiled=profiled) for count in counts]
    inside, outside = (np.array(each) for each in zip(*found, strict=True))
    if WANTED in counts or len(counts) < 3:
        return inside[-1] >= SHARE * (inside[-1] + outside[-1])
    reckoned = (float(np.polyval(np.polyfit(counts, y, power), WANTED)) for y, power in ((inside, 1), (outside, 2)))
    return said(f"{WANTED:,} pictures, reckoned from these", *reckoned)


def made(folder: Path, count: int, network: str) -> tuple[RunRef, EvaluateRecipe]:
    """A run, trained for two steps, on so many pictures."""
    pictures(folder / "made.zip", count)
    recipe = recipe_of(count, network)
    return make_run(folder / "made.zip", recipe, folder), recipe.evaluate


def anonymous_mib() -> float:
    return int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def measured(run: RunRef, recipe: EvaluateRecipe, folder: Path) -> None:
    """Evaluate here, watching this process's memory; prints it, and when it was most."""
    before, most, ended = anonymous_mib(), 0.0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not ended.wait(0.02):
            most = max(most, anonymous_mib())

    watcher = threading.Thread(target=watch)
    watcher.start()
    drawing: list[float] = []
    evaluate(run, recipe, folder, progress=lambda done, total: drawing.append(most))
    ended.set()
    watcher.join()
    print(json.dumps({"before": before, "drawing": drawing[-1], "most": most}))


def memory(counts: list[int], folder: Path) -> bool:
    """The most memory of each count, in a process of its own."""
    found = []
    for count in counts:
        own = folder / str(count)
        own.mkdir()
        run, recipe = made(own, count, "small")
        (own / "run.json").write_text(run.model_dump_json())
        (own / "recipe.json").write_text(recipe.model_dump_json())
        started = time.perf_counter()
        command = [sys.executable, "-m", "tests.benchmarks.bench_evaluate", "--within", str(own)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found.append(json.loads(done.stdout.splitlines()[-1]))
        print(
            f"{count:>7,} pictures against {run.dataset.images:,}: {found[-1]['before']:5.0f} MiB before,"
            f" {found[-1]['drawing']:5.0f} while drawing, {found[-1]['most']:5.0f} at most;"
            f" {time.perf_counter() - started:.0f} s",
            flush=True,
        )
    grown = [max(one[name] for one in found) - found[0][name] for name in ("drawing", "most")]
    good = max(grown) <= GROWTH_MIB
    print(
        f"grown by {grown[0]:.0f} MiB while drawing and {grown[1]:.0f} in all (limit {GROWTH_MIB:.0f}):"
        f" {'kept' if good else 'MISSED'}"
    )
    return good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=int, nargs="*", default=[WANTED], help="pictures; none: leave this out")
    parser.add_argument("--network", default="fashion-mnist", choices=[*PRESETS], help="preset whose network draws")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--memory", type=int, nargs="*", default=[1_000, 10_000, 50_000])
    parser.add_argument("--within", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.within:
        run = RunRef.model_validate_json((options.within / "run.json").read_text())
        recipe = EvaluateRecipe.model_validate_json((options.within / "recipe.json").read_text())
        measured(run, recipe, options.within / "evaluated")
        return
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        good = [shares(options.share, Path(name), options.network, profiled=options.profile)] if options.share else []
        good += [memory(options.memory, Path(name))] if options.memory else []
    sys.exit(not all(good))


if __name__ == "__main__":
    main()
