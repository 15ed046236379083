"""SIGKILL at random moments of a run, and a cluster that grows and shrinks: `python -m tests.benchmarks.bench_kills`.

One run each, in the exact mode, for

worker      one process that trains
node        one of three nodes, with all of its processes; a new one takes its place
driver      the process that trains, on a Ray that stays
everything  that process and all of Ray

`--moments` moments are drawn from the run's length; at every second one the kill waits until a checkpoint is being written,
and hits who writes it.  Each run must come to the digest of a run that nothing befell, and its metrics must be that one's.
Some may be missing: those that were on their way to a driver that was killed, of steps that a checkpoint has.

elastic     a cluster of 1, 2, 4 and then 1 again workers, in the exact mode and not: the samples at each position, and how
            far the weights are from those of a run on one worker
"""

import argparse
import os
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
from ray.cluster_utils import Cluster
from safetensors.torch import load_file

from diffusion.adapters import ray_train_worker
from diffusion.adapters.ray_cluster import local_ray, ray_environment
from diffusion.adapters.ray_train import fit, train_run, trainer_of
from diffusion.adapters.ray_train_worker import Job
from diffusion.data.ingest import shard_dataset
from diffusion.data.reader import ShardReader
from diffusion.data.reading import Reading
from diffusion.data.reading_order import order_of
from diffusion.data.stream import Batch
from diffusion.recipe import ShardRecipe, TrainRecipe, UNetRecipe, digest_of
from diffusion.store.refs import DatasetRef
from diffusion.training import checkpoint
from diffusion.training.loop import ignore
from diffusion.training.retention import Keep
from tests.benchmarks.killing import TIMEOUT_S, Driver, Killer, Run, cluster_of, kill_node, until, with_kills
from tests.processes import descendants, kill
from tests.test_loop import vector

BATCH = 8
EVERY = 8  # steps between two checkpoints
NODES = 3  # of one CPU each; a batch of eight goes to two of them, or to four
WORKERS = (1, 4)
KINDS = ["worker", "node", "driver", "everything", "elastic"]


def recipe_of(steps: int) -> TrainRecipe:
    return TrainRecipe(
        unet=UNetRecipe(channels=16, multipliers=(1, 2), blocks=(1, 1), attention=()),
        images=BATCH * steps,
        batch_size=BATCH,
        micro_batch=2,
        warmup_images=3 * BATCH,
        checkpoint_images=BATCH * EVERY,
        window=16,
        streams=2,
    )


def prepared(folder: Path) -> None:
    """Have Ray keep its files in a folder and ask for a token, of which a process has one for good."""
    os.environ.update(ray_environment(folder) | {"RAY_TMPDIR": str(folder)})
    token = folder / "auth_token"
    token.touch(mode=0o600)
    token.write_text(os.urandom(32).hex())
    maybe_enable_token_auth_if_token_available()


def drive(run_dir: Path, address: str) -> None:
    """What a driver of its own does."""
    recipe = TrainRecipe.model_validate_json((run_dir.parent / "recipe.json").read_text())
    dataset = DatasetRef.model_validate_json((run_dir.parent / "dataset.json").read_text())
    if address:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        train_run(recipe, dataset, run_dir, workers=WORKERS)
        return
    with local_ray(run_dir / "r", cpus=4):
        train_run(recipe, dataset, run_dir, workers=2)


def matrix(folder: Path, dataset: DatasetRef, recipe: TrainRecipe, kinds: list[str], moments: int, seed: int) -> bool:
    """The table of kills; whether all is as it should be."""
    (folder / "recipe.json").write_text(recipe.model_dump_json())
    (folder / "dataset.json").write_text(dataset.model_dump_json())
    with cluster_of(NODES) as cluster:
        calm = Run(folder / "calm")
        wanted = train_run(recipe, dataset, calm.folder, workers=2).digest
        print(
            f"{recipe.images // BATCH} steps, a checkpoint every {EVERY}; digest of the undisturbed run {wanted[:16]}\n"
        )
        print(
            "SIGKILL of  kills  aimed at a write  left half  resumes  damaged  worlds   digest     metrics: other  missing"
            "  seconds"
        )
        right = True
        for kind in kinds:
            began = time.monotonic()
            run = Run(folder / kind)
            killer = killed(kind, run, cluster, recipe, dataset, moments=moments, seed=seed)
            last = checkpoint.latest(run.folder / "checkpoints")[0]
            same = digest_of(checkpoint.verify(last)) == wanted
            history, due = run.numbers(), calm.numbers()
            others, missing = sum(record not in due for record in history), len(due) - len(history)
            right &= same and not others
            worlds = ",".join(map(str, sorted({start["world"] for start in run.starts})))
            print(
                f"{kind:<12}{killer.kills:>5}{killer.aimed:>18}{killer.half_written:>11}{len(run.starts) - 1:>9}"
                f"{len(run.events('damaged_checkpoint')):>9}  {worlds:<9}{'equal' if same else 'NOT EQUAL':<11}"
                f"{others:>14}{missing:>9}{time.monotonic() - began:>9.0f}",
                flush=True,
            )
    return right


def killed(
    kind: str, run: Run, cluster: Cluster, recipe: TrainRecipe, dataset: DatasetRef, *, moments: int, seed: int
) -> Killer:
    """Train to the end while what `kind` says is killed."""
    if kind in ("worker", "node"):
        killer = Killer(run, recipe, moments, seed, kill if kind == "worker" else partial(kill_node, cluster))
        with_kills(lambda: train_run(recipe, dataset, run.folder, workers=WORKERS, max_failures=10 * moments), killer)
        return killer
    address = cluster.address if kind == "driver" else ""
    command = [sys.executable, "-m", "tests.benchmarks.bench_kills", "--drive", str(run.folder), address]
    driver = Driver(command)
    killer = Killer(run, recipe, moments, seed, lambda _: driver.kill() if kind == "driver" else driver.kill_all())
    try:
        for number in range(moments):
            killer.strike(number, driver.over)
        if driver.process.wait(TIMEOUT_S):
            raise RuntimeError(f"a driver that nobody killed ended with {driver.process.returncode}")
    finally:
        if not driver.over():
            kill(*descendants(driver.process.pid), driver.process.pid)
    return killer


def spying(config: dict) -> tuple | None:
    """`work`, that tells the driver of each sample, and does not train beyond the gate of its number of workers."""
    gates, share_of = config["gates"], ray_train_worker.share_of

    def spied(job: Any, *rest: Any, send: Callable, **more: Any) -> Iterator[Batch]:
        gate = gates[ray.train.get_context().get_world_size()]
        for batch in share_of(job, *rest, send=send, **more):
            positions = batch.index.tolist()
            while positions[0] >= gate and not (job.run_dir / "open").exists():
                time.sleep(0.1)
            send({"event": "batch", "positions": positions, "keys": batch.keys})
            yield batch

    ray_train_worker.share_of = spied
    return ray_train_worker.work(config)


def elastic(folder: Path, dataset: DatasetRef, recipe: TrainRecipe) -> bool:
    """1 -> 2 -> 4 -> 1 workers; whether samples are as they should be and, in the exact mode, weights."""
    run, quarter = Run(folder / "grown"), recipe.images // 4
    run.folder.mkdir(parents=True)
    job = Job(recipe, dataset, run.folder, 1, False, f"train-{uuid.uuid4().hex}", Reading(), Keep(), None)
    seen: dict[int, set[str]] = {}

    def on_event(event: dict) -> None:
        for position, key in zip(event.get("positions", ()), event.get("keys", ()), strict=True):
            seen.setdefault(position, set()).add(key)

    with cluster_of(1) as cluster, ThreadPoolExecutor(1) as pool:
        wanted = train_run(recipe, dataset, folder / "calm", workers=1)
        trainer = trainer_of(
            job,
            spying,
            worlds=(1, 2, 4),
            use_gpu=False,
            resize_s=2.0,
            max_failures=10,
            gates={1: quarter, 2: 2 * quarter, 4: 3 * quarter},
        )
        trained = pool.submit(fit, job, trainer, ignore, on_event)
        for world, more in ((1, 1), (2, 2), (4, 0)):
            wanted_at = quarter * {1: 1, 2: 2, 4: 3}[world] - BATCH

            def there(world: int = world, at: int = wanted_at) -> bool:
                return trained.done() or (bool(run.starts) and run.starts[-1]["world"] == world and at in seen)

            until(there, f"{world} workers come to their gate")
            for _ in range(more):
                cluster.add_node(num_cpus=1)
        (run.folder / "open").touch()
        for node in list(cluster.worker_nodes)[1:]:
            raylet = node.all_processes["raylet"][0].process.pid
            kill(raylet, *descendants(raylet))
            cluster.remove_node(node, allow_graceful=False)
        trained.result()
    order, reader = order_of(ShardReader(dataset.uri).manifest, "train", recipe), ShardReader(dataset.uri)
    due = [reader.keys[i] for i in order.at(0, recipe.images)]
    same = seen == {position: {key} for position, key in enumerate(due)}
    ends = [Path(wanted.uri), checkpoint.latest(job.checkpoints)[0]]
    calm, grown = (vector(load_file(end / "weights.safetensors")) for end in ends)
    equal = digest_of(checkpoint.verify(ends[1])) == wanted.digest
    worlds = " -> ".join(str(start["world"]) for start in run.starts)
    mode = "fast" if recipe.micro_batch is None else "exact"
    apart = calm - grown
    print(
        f"elastic, {mode}: workers {worlds}; samples {'as they should be' if same else 'WRONG'} at {len(seen)} positions, in"
        f" {len(run.events('batch'))} shares; digest {'equal' if equal else 'not equal'}; weights differ by"
        f" {(apart.norm() / calm.norm()).item():.2g} of their length, by {apart.abs().max().item():.2g} at most",
        flush=True,
    )
    return same and (equal or recipe.micro_batch is None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=KINDS)
    parser.add_argument("--moments", type=int, default=20)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--drive", nargs=2, metavar=("FOLDER", "ADDRESS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.drive:
        return drive(Path(options.drive[0]), options.drive[1])
    recipe, right = recipe_of(options.steps), True
    with tempfile.TemporaryDirectory(prefix="kills-", dir="/tmp", ignore_cleanup_errors=True) as place:
        folder = Path(place)
        prepared(folder)
        dataset = shard_dataset("embedded", ShardRecipe(resolution=16, shard_size=512), folder / "store")
        kinds = [kind for kind in options.kinds if kind != "elastic"]
        if kinds:
            right = matrix(folder, dataset, recipe, kinds, options.moments, options.seed)
        if "elastic" in options.kinds:
            fast = recipe.model_copy(update={"micro_batch": None, "optimizer": "adamw"})
            right &= elastic(folder / "exact", dataset, recipe) & elastic(folder / "fast", dataset, fast)
    raise SystemExit(not right)


if __name__ == "__main__":
    main()
