"""The Dockerfile's own steps, without an engine: its files are copied and its packages installed into a folder, and what was
installed runs.

    python -m tests.benchmarks.bench_image            # the cpu target; some minutes, 3 GB below --folder
    python -m tests.benchmarks.bench_image --target cuda
    python -m tests.benchmarks.bench_image --wheels FOLDER    # torch from there, where its index is out of reach

Left out are the base image, the user and the paths at the root: they need an engine.  Every package is held to its sha256.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.dockerfile import steps

ROOT = Path(__file__).parents[2]


def done(folder: Path, target: str, wheels: Path | None) -> Path:
    """Do them below the folder.  Returns the environment's binaries."""
    source, venv = folder / "src", folder / "venv"
    source.mkdir()
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment.pop("PYTHONPATH", None)
    stages = steps(ROOT / "infra" / "Dockerfile")
    for instruction, words in (*stages["build"], *stages[f"build-{target}"]):
        if instruction not in ("COPY", "RUN"):
            continue
        words = words.replace("/opt/venv", str(venv)).replace("/src", str(source))
        started = time.monotonic()
        if instruction == "COPY":
            *files, to = words.split()
            for file in files:
                copied = Path(to) / Path(file).name if to.endswith("/") else Path(to)
                copied.parent.mkdir(parents=True, exist_ok=True)
                tree = (ROOT / file).is_dir()
                (shutil.copytree if tree else shutil.copy)(ROOT / file, copied)
            if wheels and (pins := source / "infra" / "requirements" / "cpu.txt").exists():
                pins.write_text(
                    pins.read_text().replace("https://download.pytorch.org/whl/cpu", wheels.resolve().as_uri())
                )
        else:
            subprocess.run(words, shell=True, cwd=source, env=environment, check=True)
            print(f"{time.monotonic() - started:6.1f} s  {words.split('install')[0][:60]}...")
    return venv / "bin"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--target", choices=("cpu", "cuda"), default="cpu")
    options.add_argument("--folder", type=Path, help="Where; else a temporary one")
    options.add_argument(
        "--wheels", type=Path, help="Folder with torch's wheel for CPUs; its sha256 is compared as well"
    )
    given = options.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder, prefix="image-") as made:
        folder = Path(made)
        binaries = done(folder, given.target, given.wheels)
        environment = {"PATH": f"{binaries}:/usr/bin:/bin", "HOME": made, "DIFFUSION_HOME": str(folder / "home")}
        for command in ("diffusion --help", "ray --version", "mlflow --version", "prefect --version", "serve --help"):
            subprocess.run(command.split(), env=environment, cwd=made, check=True, stdout=subprocess.DEVNULL)
        drawn = "import diffusion, flows, psycopg, asyncpg, torch; print(torch.__version__, diffusion.__file__)"
        subprocess.run([binaries / "python", "-c", drawn], env=environment, cwd=made, check=True)
        size = sum(
            path.stat().st_size for path in (folder / "venv").rglob("*") if path.is_file() and not path.is_symlink()
        )
        print(f"{size / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
