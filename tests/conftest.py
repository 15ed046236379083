"""Fixtures that several files share.  Everything a test writes lies under pytest's temporary folder."""

import io
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from diffusion.adapters.mlflow_tracking import mlflow_environment
from diffusion.presets import PRESETS
from diffusion.recipe import Recipe
from tests.s3_server import NoServer, S3Server, s3_server

os.environ.update(mlflow_environment())  # before anything imports MLflow
# Tests run two at a time on two cores: with more threads OpenMP's wait for each other in a loop, thirty times as long
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "integration" in item.path.parts:
            item.add_marker(pytest.mark.slow)
            item.add_marker(pytest.mark.timeout(600))


@contextmanager
def short_folder() -> Iterator[Path]:
    """A folder with a short path: Unix sockets allow 107 bytes."""
    folder = Path(tempfile.mkdtemp(prefix="dt-", dir="/tmp"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def short_tmp() -> Iterator[Path]:
    with short_folder() as folder:
        yield folder


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Bits may depend on the number of threads, and networks as small as the tests' are slower on two."""
    from diffusion.threads import one_thread

    with one_thread():
        yield


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    """A real Ray with four logical CPUs for the whole session."""
    from diffusion.adapters.ray_cluster import local_ray

    with short_folder() as folder, local_ray(folder / "ray", cpus=4):
        yield


@pytest.fixture(scope="session")
def emoji_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty real pictures in three class folders with metadata.jsonl, the imagefolder convention."""
    import json

    folder = tmp_path_factory.mktemp("emoji")
    archive = Path(__file__).parent.parent / "diffusion" / "data" / "embedded" / "noto-emoji-64.zip"
    kept = {"flags": 0, "smileys-emotion": 0, "food-drink": 0}
    with zipfile.ZipFile(archive) as source, open(folder / "metadata.jsonl", "w") as metadata:
        for line in io.TextIOWrapper(source.open("metadata.jsonl"), "utf-8"):
            row = json.loads(line)
            if kept.get(row["label"], 20) < 20:
                kept[row["label"]] += 1
                target = folder / row["file_name"]
                target.parent.mkdir(exist_ok=True)
                target.write_bytes(source.read(row["file_name"]))
                metadata.write(line)
    return folder


@pytest.fixture(scope="session")
def tiny_recipe() -> Recipe:
    """The preset `smoke`: every stage in seconds."""
    return PRESETS["smoke"]()


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    """A real S3 server for the session; os.environ leads to it."""
    with ExitStack() as stack:
        try:
            server = stack.enter_context(s3_server())
        except NoServer as error:
            pytest.skip(str(error))
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        for key in [key for key in os.environ if key.startswith("AWS_")]:
            patch.delenv(key)
        for key, value in server.environment.items():
            patch.setenv(key, value)
        yield server
