"""`shard` night after night: nothing new is done at once, a change gives a version, what people release stays."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from PIL import Image

from diffusion.data import manifest
from diffusion.store.storage import open_storage
from tests.s3_server import S3Server

ROOT = Path(__file__).parents[2]
NIGHTS = """
import sys
from pathlib import Path
from PIL import Image
from diffusion.data import ingest, quarantine
from diffusion.recipe import ShardRecipe
from diffusion.store.storage import open_storage
from flows.foreground import prefect_ready
from flows.site import Site, keeping_ray

source, new = sys.argv[2], Path(sys.argv[2], "flags", "new.png")
site = Site(home=sys.argv[1], data=sys.argv[3], gpu=False)
recipe = ShardRecipe(resolution=16, holdout=0.1, min_side=20, max_rejected=0.5)
site.prepare()
root = open_storage(site.data_root)
with prefect_ready(), keeping_ray():
    from flows.finished import dataset_of
    from flows.shard import shard

    def night():
        ref = shard(recipe, source, site)
        assert dataset_of(recipe, source, site) == ref
        print(f"= {ref.digest}", flush=True)
        return ref

    first = night()
    night()
    (file,) = (file for file in quarantine.entries(root, first.digest) if file.kind == "too small")
    print(file.sha256, ingest.release(root, first.digest, [file.sha256], site.home / "work").digest)
    night()
    Image.new("RGB", (40, 40), "#123456").save(new)
    night()
    new.unlink()
    night()
"""


def test_every_night(emoji_folder, tmp_path, short_tmp, s3: S3Server):
    source, root, home = tmp_path / "pictures", open_storage(f"{s3.bucket()}/data"), short_tmp / "nights"
    shutil.copytree(emoji_folder, source)
    Image.new("RGB", (8, 8), "#336699").save(source / "flags" / "small.png")
    command = [sys.executable, "-c", NIGHTS, str(home), str(source), root.uri]
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("DIFFUSION_", "PREFECT_", "RAY_"))}
    done = subprocess.run(command, cwd=ROOT, env=kept, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    made = [line.removeprefix("= ") for line in lines if line.startswith("= ")]
    ((sha256, released),) = (line.split() for line in lines if len(line) == 129)
    first, again, night, second, third = made
    assert first == again
    assert night == released  # the newest of the same state, and nothing was to be done
    said = ["not done again" in line for line in (done.stdout + done.stderr).splitlines() if line.startswith("✓ shard")]
    assert said == [False, True, True, False, False]
    versions = {digest: manifest.load(f"{root.uri}/{manifest.place_of(digest)}", digest=digest) for digest in made}
    assert (versions[second].parent, versions[second].released) == (released, (sha256,))
    assert versions[third].parent == second  # as it was before is another version, which goes on from the last
    assert not any(found.name.startswith("work/") for found in root.walk())
    assert not (home / "work").exists()
