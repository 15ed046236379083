"""Sharding from and to a real S3 server: the same bytes as on the disk, through interruptions and a faulty network."""

import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from diffusion.data import ingest, manifest, quarantine
from diffusion.store.retry import Patience
from diffusion.store.storage import Storage, open_storage
from tests.faulty_proxy import FaultyProxy
from tests.published import identity
from tests.s3_server import S3Server
from tests.test_ingest import RECIPE, in_small_chunks, side_files, spoilt_folder  # noqa: F401

ROOT = Path(__file__).parents[2]


def uploaded(folder: Path, storage: Storage) -> Storage:
    for path in folder.rglob("*"):
        if path.is_file():
            storage.put(str(path.relative_to(folder)), path)
    return storage


def downloaded(root: Storage, folder: Path) -> Path:
    for found in root.walk():
        target = folder / found.name
        target.parent.mkdir(parents=True, exist_ok=True)
        root.fetch(found.name, target)
    return folder


@pytest.fixture
def plain(spoilt_folder, tmp_path) -> str:  # noqa: F811
    """The dataset as the disk has it."""
    return ingest.shard_dataset(spoilt_folder, RECIPE, tmp_path / "plain").uri


def is_the_same(plain: str, root: Storage, digest: str, folder: Path) -> None:
    uri = f"{downloaded(root, folder)}/{manifest.place_of(digest)}"
    assert identity(uri) == identity(plain)
    assert side_files(uri).keys() == side_files(plain).keys()
    assert not (folder / "work").exists()


def test_an_interrupted_stage_goes_on_without_making_shards_again(
    s3: S3Server,
    spoilt_folder,  # noqa: F811
    plain,
    tmp_path,
    monkeypatch,
):
    in_small_chunks(monkeypatch)
    source, root = uploaded(spoilt_folder, open_storage(f"{s3.bucket()}/pictures")), open_storage(f"{s3.bucket()}/data")
    before, failures = len(s3.requests()), 0

    def failing(function, tasks):
        for number, task in enumerate(tasks):
            if number == 2:
                raise OSError("interrupted")
            yield function(task)

    ref = None
    while ref is None:
        try:
            ref = ingest.shard_dataset(source.uri, RECIPE, root, tmp_path / "work", each=failing)
        except OSError:
            failures += 1
    assert failures > 4
    assert ref.uri == f"{root.uri}/{manifest.place_of(ref.digest)}"
    puts = Counter(r.path for r in s3.requests()[before:] if r.method == "PUT" and r.status == 200)
    shards = [path for path in puts if path.endswith(".tar") and "/shards/" in path]
    assert len(shards) == len(manifest.load(ref.uri).shards)
    assert {puts[path] for path in shards} == {1}
    assert any("/work/" in path for path in puts)  # where workers on other machines find the pictures
    is_the_same(plain, root, ref.digest, tmp_path / "copy")
    for file in quarantine.entries(root, ref.digest):
        if file.tar:
            assert quarantine.original(root, file) == (spoilt_folder / file.name).read_bytes()
    assert ingest.shard_dataset(source.uri, RECIPE, root, tmp_path / "work") == ref
    assert list(tmp_path.glob("work/*")) == []


def test_a_faulty_network_changes_nothing(s3: S3Server, spoilt_folder, plain, tmp_path, monkeypatch):  # noqa: F811
    in_small_chunks(monkeypatch)
    monkeypatch.setattr(Patience, "wait_s", lambda self, failed: 0.001)
    source, root = uploaded(spoilt_folder, open_storage(f"{s3.bucket()}/pictures")), open_storage(f"{s3.bucket()}/data")
    kinds = ("reset", "reset after", "500", "503", "truncated", "short")
    with FaultyProxy(s3.url, seed=3, rate=0.3, kinds=kinds) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        ref = ingest.shard_dataset(source.uri, RECIPE, root, tmp_path / "work")
    assert set(proxy.injected) == set(kinds)
    assert sum(proxy.injected.values()) > 50
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.url)
    is_the_same(plain, root, ref.digest, tmp_path / "copy")


def test_two_machines_that_do_the_same_work_leave_each_other_alone(s3: S3Server, spoilt_folder, plain, tmp_path):  # noqa: F811
    root, refs = open_storage(f"{s3.bucket()}/data"), []

    def beside(function, tasks):
        for result in map(function, tasks):
            if not refs:  # the other machine begins later and is faster
                refs.append(ingest.shard_dataset(spoilt_folder, RECIPE, root, tmp_path / "other"))
            yield result

    refs.append(ingest.shard_dataset(spoilt_folder, RECIPE, root, tmp_path / "work", each=beside))
    assert refs[0] == refs[1]
    is_the_same(plain, root, refs[0].digest, tmp_path / "copy")


ON_RAY = """
import sys
from pathlib import Path
from diffusion.adapters.ray_cluster import local_ray
from diffusion.adapters.ray_data import shard_dataset
from diffusion.recipe import ShardRecipe
source, recipe, root, work, home = sys.argv[1:]
with local_ray(Path(home), cpus=2):
    print(shard_dataset(source, ShardRecipe.model_validate_json(recipe), root, Path(work)).digest)
"""


def test_workers_read_and_write_the_bucket(s3: S3Server, spoilt_folder, plain, tmp_path, short_tmp):  # noqa: F811
    """On a Ray of its own: workers have the environment that Ray was started in, and another test's lacks the bucket's."""
    source, root = uploaded(spoilt_folder, open_storage(f"{s3.bucket()}/pictures")), open_storage(f"{s3.bucket()}/data")
    places = (source.uri, RECIPE.model_dump_json(), root.uri, str(tmp_path / "work"), str(short_tmp / "ray-s3"))
    said = subprocess.run([sys.executable, "-c", ON_RAY, *places], capture_output=True, text=True, cwd=ROOT)
    assert said.returncode == 0, said.stderr
    is_the_same(plain, root, said.stdout.split()[-1], tmp_path / "copy")


def test_a_bucket_needs_a_folder_for_the_work(s3: S3Server, spoilt_folder):  # noqa: F811
    with pytest.raises(ValueError, match="name a local folder for the work"):
        ingest.shard_dataset(spoilt_folder, RECIPE, s3.bucket())


def test_abandoned_work_is_deleted_in_the_bucket_too(s3: S3Server, spoilt_folder, tmp_path, monkeypatch):  # noqa: F811
    in_small_chunks(monkeypatch)
    root, work = open_storage(f"{s3.bucket()}/data"), tmp_path / "work"

    def failing(function, tasks):
        yield function(next(iter(tasks)))
        raise OSError("interrupted")

    for source in ("one", "two"):
        shutil.copytree(spoilt_folder, tmp_path / source)
        with pytest.raises(OSError, match="interrupted"):
            ingest.shard_dataset(tmp_path / source, RECIPE, root, work, each=failing)
    places = sorted({found.name.split("/")[1] for found in root.walk("work/")})
    assert len(places) == 2
    old, young = sorted(work.iterdir())
    os.utime(old / "lock", (0, 0))
    with pytest.raises(OSError, match="interrupted"):
        ingest.shard_dataset(spoilt_folder, RECIPE, root, work, each=failing)
    assert not old.exists()
    assert young.exists()
    left = {found.name.split("/")[1] for found in root.walk("work/")}
    assert not any(place.startswith(old.name) for place in left)
    assert any(place.startswith(young.name) for place in left)
