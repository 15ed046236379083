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
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch

from diffusion.data.images import encode_png
from diffusion.data.ingest import shard_dataset
from diffusion.data.reader import ShardReader
from diffusion.denoiser import denoiser_of
from diffusion.peak import peaks
from diffusion.presets import PRESETS
from tests.benchmarks.bench_train_step import forward_flops
from tests.benchmarks.trainers import DEVICE, PEERS, SIDES, Setting, finished

LIMITS = {"cpu": 1.8, "cuda": 2.0}


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
