"""Plans against runs: `python -m tests.benchmarks.bench_plan [--runs smoke short own] [--fashion-mnist FOLDER]`.

Each run is planned by `diffusion plan`, with a probe, and then run by `diffusion run --until register` in a new home on this
machine; what the stages took is read from MLflow, where the run noted it, and the whole by the clock.  Limit: the whole
within 20 % of the plan.  The load of the machine is told beside, since a probe sees that of its own moment alone.

smoke: the preset.  short: the demo's network and pictures, a shorter training.  own: a folder of the embedded pictures
enlarged to 128 px PNGs, as a person's own might be, at 32 px.  fashion-mnist: its IDX files at 32 px, a small network.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

LIMIT = 0.2
ROOT = Path(__file__).parents[2]
EMBEDDED = ROOT / "diffusion" / "data" / "embedded" / "noto-emoji-64.zip"
SMALL = (
    *("--set", "shard.resolution=32", "--set", "train.unet.channels=32", "--set", "train.unet.attention=[]"),
    *("--set", "train.unet.multipliers=1,2", "--set", "train.unet.blocks=1,1", "--set", "evaluate.samples=128"),
)
RUNS = {
    "smoke": ("--preset", "smoke"),
    "short": ("--preset", "demo", "--set", "train.images=4000", "--set", "evaluate.samples=128"),
    "own": ("--preset", "demo", *SMALL, "--set", "train.images=12000"),
    "fashion-mnist": ("--preset", "demo", *SMALL, "--set", "train.images=12000", "--set", "shard.shard_size=1024"),
}


def program(home: Path, *arguments: str) -> tuple[str, float]:
    """What the program said, and its seconds.  Raises SystemExit where it failed."""
    began = time.monotonic()
    command = [sys.executable, "-c", "from flows.cli import main; main()", *arguments, "--home", str(home)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "DIFFUSION_GPU": "false"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stdout}\n{done.stderr}")
    return done.stdout, time.monotonic() - began


def own_pictures(folder: Path) -> Path:
    """Embedded pictures, enlarged, in a folder for each class."""
    from PIL import Image

    with zipfile.ZipFile(EMBEDDED) as archive:
        for line in io.TextIOWrapper(archive.open("metadata.jsonl"), "utf-8"):
            row = json.loads(line)
            target = folder / row["label"] / Path(row["file_name"]).name
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.open(io.BytesIO(archive.read(row["file_name"]))).convert("RGBA").resize((128, 128)).save(target)
    return folder


def measured(name: str, source: tuple[str, ...], folder: Path) -> tuple[dict, dict[str, float], float, float]:
    """The plan, what MLflow has of the run, and the seconds of the plan's command and of the run's."""
    home = folder / name
    line = (*RUNS[name], *source, "--until", "register")
    said, looking_s = program(home, "plan", *line, "--json")
    _, running_s = program(home, "run", *line, "--no-wait")
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{home / 'mlflow.db'}")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = client.search_runs(experiments, "metrics.plan_all_s > 0")
    return json.loads(said), dict(runs[0].data.metrics), looking_s, running_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", choices=[*RUNS], default=["smoke", "short", "own"])
    parser.add_argument("--fashion-mnist", type=Path, help="Folder with its IDX files")
    given = parser.parse_args()
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    worst = 0.0
    with tempfile.TemporaryDirectory(prefix="dp-", dir="/tmp") as name:
        folder = Path(name)
        for run in given.runs:
            source: tuple[str, ...] = ()
            if run == "own":
                source = ("--source", str(own_pictures(folder / "pictures")))
            elif run == "fashion-mnist":
                source = ("--source", str(given.fashion_mnist))
            before = os.getloadavg()[0]
            plan, metrics, looking_s, running_s = measured(run, source, folder)
            ratio = running_s / plan["seconds"]
            worst = max(worst, abs(ratio - 1))
            print(f"{run}: planned {plan['seconds']:.1f} s, taken {running_s:.1f} s: {ratio:.2f} times", flush=True)
            print(
                f"  the plan itself took {looking_s:.1f} s; load {before:.1f} before and {os.getloadavg()[0]:.1f} after"
            )
            for stage in plan["stages"]:
                taken = metrics.get(f"taken_{stage['name']}_s")
                if taken is not None:
                    print(
                        f"  {stage['name']:<9} {stage['seconds']:7.1f} s ({stage['low']:.1f} to {stage['high']:.1f}),"
                        f" of which work {stage['working']:.1f}; taken {taken:7.1f} s: {taken / stage['seconds']:.2f} times"
                    )
            beside = running_s - metrics["taken_all_s"]
            begun = next(stage for stage in plan["stages"] if stage["name"] == "begin")
            print(f"  beside the stages: planned {begun['seconds']:.1f} s, taken {beside:.1f} s")
            rates = plan["rates"]
            print(
                f"  rates: { {key: value for key, value in rates.items() if key != 'step_s'} }, steps {rates['step_s']}"
            )
    print(f"worst {worst:.0%}, limit {LIMIT:.0%}: {'kept' if worst <= LIMIT else 'MISSED'}")


if __name__ == "__main__":
    main()
