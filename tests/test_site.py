"""Where things run comes from the environment, stays inside one folder, and is no part of a recipe."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from diffusion.data.reading import Reading
from diffusion.presets import PRESETS
from diffusion.recipe import Recipe
from diffusion.serving.keys import add
from diffusion.store.storage import StorageRefused
from flows.preflight import check, check_devices, check_home, check_port, check_serving, check_training
from flows.site import Site, keeping_ray, ray_is_kept, ray_running
from tests.ports import free_port
from tests.random_bundle import published_model

FIELDS = {
    "home": "/somewhere",
    "data": "/pictures/root",
    "runs": "s3://bucket/models",
    "bundles": "s3://bucket/bundles",
    "keep_last": "3",
    "keep_images": "50000",
    "keep_best": "2",
    "workers": "3",
    "gpu": "false",
    "recompute": "true",
    "shard_weights": "true",
    "validation": "true",
    "host": "0.0.0.0",
    "open": "true",
    "port": "8123",
    "replicas": "2",
    "replica_gpus": "0.5",
    "idle_s": "30",
    "models_mib": "900",
    "mlflow": "http://mlflow:5000",
    "ray": "ray://head:10001",
    "ray_ship": "true",
    "prefect": "http://prefect:4200/api",
    "shard_copies_mib": "500",
    "max_damaged": "0.01",
}


def test_each_field_is_a_variable() -> None:
    assert set(FIELDS) == set(Site.model_fields)
    site = Site.from_environment({f"DIFFUSION_{name.upper()}": value for name, value in FIELDS.items()})
    assert site.model_dump(mode="json") == FIELDS | {
        "keep_last": 3,
        "keep_images": 50_000,
        "keep_best": 2,
        "workers": 3,
        "gpu": False,
        "recompute": True,
        "shard_weights": True,
        "ray_ship": True,
        "validation": True,
        "open": True,
        "port": 8123,
        "replicas": 2,
        "replica_gpus": 0.5,
        "idle_s": 30,
        "models_mib": 900,
        "shard_copies_mib": 500,
        "max_damaged": 0.01,
    }
    assert site.reading == Reading(copies="/somewhere/cache/shards", copies_mib=500, max_damaged=0.01)


def test_given_values_win_over_the_environment() -> None:
    assert Site.from_environment({"DIFFUSION_PORT": "8123"}, port=9, workers=None).port == 9


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("PORT", "high", "port=high"),
        ("PORT", "70000", "65535"),
        ("WORKERS", "0", "workers=0"),
        ("WORKERS", "4:2", "workers=4:2: at least one must train, and the most come after the least"),
        ("WORKERS", "1:2:3", "workers=1:2:3: neither a number, as 4, nor a least and a most, as 2:8"),
        ("REPLICAS", "3:2", "replicas=3:2: at least one must serve, and the most come after the least"),
        ("REPLICA_GPUS", "1.5", "replica_gpus=1.5: a share of one GPU, as 0.5, or a whole number of them"),
        ("WORKRES", "2", "DIFFUSION_WORKERS"),
        ("KEEP_IMAGES", "500", "^keep_images=500: all checkpoints stay without DIFFUSION_KEEP_LAST"),
        ("KEEP_BEST", "2", "^keep_best=2: all checkpoints stay without DIFFUSION_KEEP_LAST"),
        ("DATA", "gs://b/x", "^data=gs://b/x: gs://b/x: 'gs' is no kind of storage"),
    ],
)
def test_a_wrong_variable_is_named(name: str, value: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Site.from_environment({f"DIFFUSION_{name}": value})


def test_everything_lies_in_the_home(tmp_path: Path) -> None:
    site = Site(home=tmp_path / "home")
    for folder in (site.store, site.logs, Path(site.mlflow_uri.removeprefix("sqlite:///"))):
        assert folder.is_relative_to(site.home)
    for name, value in site.environment().items():
        if "/" in value:
            assert Path(value).is_relative_to(site.home), name


def test_prepare_respects_what_the_user_set(tmp_path: Path) -> None:
    program = f"""
import os
from flows.site import Site
Site(home={str(tmp_path / "home")!r}).prepare()
print(os.environ["PREFECT_HOME"], os.environ["MPLCONFIGDIR"], os.environ["RAY_USAGE_STATS_ENABLED"])
"""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "MPL", "RAY_"))}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment | {"PREFECT_HOME": "/mine"},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout.split() == ["/mine", str(tmp_path / "home/cache/matplotlib"), "0"]
    assert (tmp_path / "home" / "store").is_dir()


def test_a_site_changes_no_recipe() -> None:
    assert not set(Site.model_fields) & set(Recipe.model_fields)


def test_a_port_in_use_is_found_before_the_work(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        site = Site(home=tmp_path, port=other.getsockname()[1])
        with pytest.raises(ValueError, match=f"{site.port}.*--port N"):
            check_port(site)
    check_port(site)
    with pytest.raises(ValueError, match="8000 to 8999"):
        check_port(Site(home=tmp_path, port=8500))


def test_a_batch_that_cannot_be_divided_is_found_before_the_work(tmp_path: Path) -> None:
    recipe = PRESETS["smoke"]().train  # 8 pictures a batch
    exact = recipe.model_copy(update={"micro_batch": 4})
    check_devices(Site(home=tmp_path, workers=4, gpu=False), recipe)
    with pytest.raises(ValueError, match=r"batch_size=8 cannot be divided over 3 workers.*DIFFUSION_WORKERS"):
        check_devices(Site(home=tmp_path, workers=3, gpu=False), recipe)
    with pytest.raises(ValueError, match=r"micro_batch=4 make 2 micro-batches.*choose 1 or 2 workers"):
        check_devices(Site(home=tmp_path, workers=4, gpu=False), exact)
    check_devices(Site(home=tmp_path, workers="3:4", gpu=False), recipe)
    with pytest.raises(ValueError, match="no number of workers from 5 to 7 divides batch_size=8"):
        check_devices(Site(home=tmp_path, workers="5:7", gpu=False), recipe)


def test_workers_may_be_a_least_and_a_most() -> None:
    site = Site.from_environment({"DIFFUSION_WORKERS": "2:8"})
    assert (site.train_workers, site.most_workers) == ((2, 8), 8)
    assert Site.model_validate_json(site.model_dump_json()) == site


def test_a_home_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot be written"):
        check_home(Site(home=tmp_path / "file" / "home"))


def test_an_endpoint_that_would_end_with_its_flow_is_refused(tmp_path: Path) -> None:
    site = Site(home=tmp_path)
    with pytest.raises(ValueError, match="DIFFUSION_RAY"):
        check_serving(site)
    with keeping_ray():
        assert ray_is_kept()
        check_serving(site.model_copy(update={"port": free_port()}))
    assert not ray_is_kept()


def test_a_sigterm_while_ray_starts_is_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def starting() -> Iterator[None]:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(15))  # as Ray's
        signal.raise_signal(signal.SIGTERM)
        yield

    ours = signal.signal(signal.SIGTERM, lambda *_: sys.exit(15))  # of a Ray of before
    monkeypatch.setattr("flows.site._local", lambda site: starting())
    try:
        with pytest.raises(KeyboardInterrupt), ray_running(Site(home=tmp_path)):
            pytest.fail("the block must not start")
    finally:
        signal.signal(signal.SIGTERM, ours)


def test_an_endpoint_beyond_loopback_without_keys_is_refused_unless_that_is_wanted(tmp_path: Path) -> None:
    site = Site(home=tmp_path, host="0.0.0.0", port=free_port(), ray="auto")  # a cluster's port is not looked at
    with pytest.raises(ValueError, match=r"0\.0\.0\.0 .*diffusion keys add NAME.*DIFFUSION_HOST.*DIFFUSION_OPEN=true"):
        check_serving(site)
    with pytest.raises(ValueError, match="diffusion keys add NAME"):
        check(PRESETS["smoke"](), "embedded", "deploy", site)
    check_serving(site.model_copy(update={"host": "localhost"}))
    opened = site.model_copy(update={"open": True})
    check_serving(opened)
    assert (site.access.needed, opened.access.needed) == (True, False)
    add(site.access.keys, "web")
    check_serving(site)
    site.access.keys.write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        check_serving(site)


@pytest.mark.parametrize(
    ("source", "until", "says"), [("/nowhere", "register", "/nowhere"), ("embedded", "publish", "until")]
)
def test_the_line_checks_what_it_is_given(tmp_path: Path, source: str, until: str, says: str) -> None:
    recipe = PRESETS["smoke"]()
    check(recipe, "embedded", "register", Site(home=tmp_path, gpu=False))
    with pytest.raises(ValueError, match=says):
        check(recipe, source, until, Site(home=tmp_path, gpu=False))


def test_the_line_and_training_check_where_copies_go_and_where_weights_come_from(tmp_path: Path) -> None:
    recipe, copies = PRESETS["smoke"](), tmp_path / "copies"
    copies.mkdir()
    (copies / "elsewhere").symlink_to(tmp_path)
    site = Site(home=tmp_path / "home", gpu=False, runs=str(copies))
    with pytest.raises(StorageRefused, match="elsewhere is a link to a folder"):
        check(recipe, "embedded", "register", site)
    with pytest.raises(StorageRefused, match="elsewhere is a link to a folder"):
        check_training(site, recipe.train)
    site = Site(home=tmp_path / "home", gpu=False)
    with pytest.raises(ValueError, match="no model 'demo' is registered"):
        check(recipe, "embedded", "register", site, init="demo")
    digest = published_model(site.store).digest
    check_training(site, recipe.train)
    with pytest.raises(ValueError, match=r"train\.unet\.\w+ is .* leave out --init"):
        check(recipe, "embedded", "register", site, init=digest)


@pytest.mark.parametrize(
    ("gpu", "wanted", "validates"),
    [(False, None, False), (True, None, True), (False, True, True), (True, False, False)],
)
def test_checkpoints_are_measured_where_cores_wait_or_somebody_wants_it(gpu, wanted, validates) -> None:
    assert Site(gpu=gpu, validation=wanted).validates == validates


def test_the_best_stay_where_checkpoints_are_measured_and_asking_for_them_has_them_measured() -> None:
    assert Site(gpu=False, keep_last=2, keep_best=1).validates
    variables = {"DIFFUSION_KEEP_LAST": "2", "DIFFUSION_KEEP_BEST": "1", "DIFFUSION_VALIDATION": "false"}
    with pytest.raises(ValueError, match=r"^keep_best=1: none is judged with DIFFUSION_VALIDATION=false"):
        Site.from_environment(variables)
