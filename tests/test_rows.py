"""Features kept in a file: the same numbers, in any order of writing, with no file left behind."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from diffusion.evaluation.rows import Rows, unnamed

ROOT = Path(__file__).parent.parent


def test_parts_come_in_any_order_to_their_places(tmp_path):
    generator = np.random.default_rng(0)
    features = generator.normal(size=(23, 5)).astype(np.float32)
    small = generator.integers(0, 256, (23, 2, 2, 3), dtype=np.uint8)
    parts = {4: slice(0, 8), 9: slice(8, 8), 2: slice(8, 23)}  # one of none
    for order in ((4, 9, 2), (2, 4, 9)):
        rows = Rows(tmp_path / "new", [(name, part.stop - part.start) for name, part in parts.items()])
        for name in order:
            rows.put(name, {"features": features[parts[name]], "small": small[parts[name]]} if name != 9 else {})
        assert np.array_equal(rows["features"].numpy(), features)
        assert np.array_equal(rows["small"].numpy(), small)
    assert list((tmp_path / "new").iterdir()) == []
    nothing = Rows(tmp_path, [(0, 0)])
    nothing.put(0, {"features": features[:0]})
    assert nothing["features"].shape == (0, 5)


def test_the_file_is_gone_with_the_array(tmp_path):
    def mapped() -> int:
        return Path("/proc/self/maps").read_text().count(str(tmp_path))

    array = unnamed(tmp_path, (100, 100), np.dtype(np.float32))
    array[:] = 1
    assert mapped() == 1  # a file, and no memory of this process's own
    assert list(tmp_path.iterdir()) == []
    del array
    assert mapped() == 0


def test_parts_of_another_width_are_refused(tmp_path):
    rows = Rows(tmp_path, [(0, 2), (1, 2)])
    rows.put(0, {"features": np.zeros((2, 3), np.float32)})
    with pytest.raises(ValueError, match="broadcast"):
        rows.put(1, {"features": np.zeros((2, 4), np.float32)})


_ON_A_FULL_DISK = """
from pathlib import Path
import numpy as np
from diffusion.evaluation.reference import PIXELS, ReferenceIdentity, remember
from diffusion.evaluation.rows import unnamed
from diffusion.store.publish import DiskFull

def drawn():
    unnamed(Path("small/new"), (1024, 1024), np.dtype(np.float32))[:] = 1

def kept():
    identity = ReferenceIdentity(dataset_digest="0" * 64, pictures=1024, extractor=PIXELS, torch="2", device="cpu")
    remember(Path("small"), identity, np.ones((1024, 1024), np.float32))

for write in (drawn, kept):
    try:
        write()
    except DiskFull as error:
        print(error)
print(sorted(path.name for path in Path("small").rglob("*")))
"""


def test_a_disk_without_room_for_features_is_told_and_ends_no_process(tmp_path):
    """A file that is only named at its full length would end it by a signal, at a write into memory."""
    (tmp_path / "small").mkdir()
    mount = 'mount -t tmpfs -o size=1m none small && exec "$0" -c "$1"'
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, sys.executable, _ON_A_FULL_DISK],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    if "unshare" in done.stderr or "mount" in done.stderr:
        pytest.skip(f"no small file system can be had here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    *errors, left = done.stdout.splitlines()
    assert len(errors) == 2
    for error, folder in zip(errors, ("small/new", "small/features"), strict=True):
        assert re.search(
            rf"no room for the features of pictures in {folder}, [\d,]+ bytes are left .*: free some", error
        )
    assert left == "['features', 'new']"
