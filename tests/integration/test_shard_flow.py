"""`diffusion shard` night after night: nothing new is done at once, a change gives a version, what people release stays."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

from PIL import Image

from diffusion.data import ingest, manifest, quarantine
from diffusion.store.storage import open_storage
from tests.integration.test_pipeline import ROOT, Place
from tests.s3_server import S3Server


def shard(place: Place, source: str, root: str) -> tuple[str, str]:
    """What the command printed, and the first digits of the dataset's digest."""
    command = [
        sys.executable,
        "-c",
        "from flows.cli import main; main()",
        "shard",
        "--preset",
        "smoke",
        "--source",
        source,
    ]
    command += ["--set", "shard.min_side=20", "--set", "shard.max_rejected=0.5"]
    environment = place.environment() | {"DIFFUSION_DATA": root}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr, re.search(r"digest +([0-9a-f]{16})", done.stdout + done.stderr)[1]


def test_every_night(emoji_folder, tmp_path, s3: S3Server):
    place, source, root = Place(tmp_path), tmp_path / "pictures", open_storage(f"{s3.bucket()}/data")
    shutil.copytree(emoji_folder, source)
    Image.new("RGB", (8, 8), "#336699").save(source / "flags" / "small.png")
    _, first = shard(place, str(source), root.uri)
    said, again = shard(place, str(source), root.uri)
    assert "done before" in said
    assert again == first
    (file,) = (file for file in quarantine.entries(root, first) if file.kind == "too small")
    released = ingest.release(root, first, [file.sha256], tmp_path / "work")
    said, now = shard(place, str(source), root.uri)
    assert "done before" in said
    assert now == released.digest[:16]
    Image.new("RGB", (40, 40), "#123456").save(source / "flags" / "new.png")
    said, second = shard(place, str(source), root.uri)
    assert "done before" not in said
    made = manifest.load(f"{root.uri}/{manifest.place_of(second)}")
    assert (made.parent, made.released) == (released.digest, (file.sha256,))
    (source / "flags" / "new.png").unlink()  # as it was: still another version, which goes on from the last
    _, third = shard(place, str(source), root.uri)
    assert manifest.load(f"{root.uri}/{manifest.place_of(third)}").parent == made.digest
    assert not any(found.name.startswith("work/") for found in root.walk())
    assert not Path(place.home / "work").exists()
