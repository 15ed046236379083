"""`diffusion doctor` against a team's servers, all of them real: nothing where all is well, each planted fault by name."""

import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from diffusion.adapters.mlflow_schema import newest_schema
from flows.doctor.examine import examine
from flows.doctor.finding import Asked, Finding
from flows.doctor.versions import LOCK
from flows.site import Site
from tests.faulty_proxy import FaultyProxy
from tests.integration.test_prefect_server import environment  # noqa: F401  a fixture: a real Prefect server
from tests.mlflow_server import mlflow_server
from tests.ports import free_port
from tests.postgres_server import NoPostgres, postgres
from tests.program import ROOT
from tests.s3_server import GUEST
from tests.test_doctor import OF_THE_MACHINE

_AND_WHAT_IT_IMPORTED = """
import sys
from flows.cli import app
try:
    app(["doctor", "--json"])
except SystemExit:
    print([name for name in ("ray", "prefect") if name in sys.modules])
"""


@dataclass(frozen=True)
class Servers:
    prefect: str
    mlflow: str
    bucket: str


@pytest.fixture(scope="module")
def servers(s3, environment, short_tmp: Path) -> Iterator[Servers]:  # noqa: F811
    bucket = s3.bucket()
    try:
        with postgres(short_tmp / "doctor-pg") as database:
            arguments = ("--backend-store-uri", database, "--artifacts-destination", f"{bucket}/mlflow")
            with mlflow_server(short_tmp / "doctor-mlflow", *arguments, variables=s3.environment) as mlflow:
                yield Servers(environment["PREFECT_API_URL"], mlflow.url, bucket)
    except NoPostgres as error:
        pytest.skip(str(error))


@pytest.fixture
def site(servers: Servers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    for name in [name for name in os.environ if name.startswith(("DIFFUSION_", "PREFECT_API_", "MLFLOW_TRACKING_"))]:
        monkeypatch.delenv(name)
    return Site(
        home=tmp_path / "d",
        gpu=False,
        port=free_port(),
        prefect=servers.prefect,
        mlflow=servers.mlflow,
        data=f"{servers.bucket}/data",
        bundles=f"{servers.bucket}/models",
    )


def looked(site: Site) -> list[Finding]:
    return list(examine(Asked(site, LOCK)))


def bad(findings: list[Finding]) -> dict[str, Finding]:
    return {found.check: found for found in findings if found.state != "ok" and found.check not in OF_THE_MACHINE}


def test_where_all_is_well_there_is_no_finding_and_nothing_stays(
    site: Site, servers: Servers, s3, tmp_path: Path
) -> None:
    findings = looked(site)
    assert bad(findings) == {}
    said = {found.check: found.what for found in findings}
    assert "Prefect 3." in said["prefect"]
    assert "MLflow 3." in said["mlflow"]
    assert said["mlflow files"] == f"{servers.mlflow} keeps files"
    assert said["data"] == f"{servers.bucket}/data: list, put, read and remove"
    assert {found.what.partition(",")[0] for found in findings if found.check == "clock"} == {
        "as Prefect's",
        "as MLflow's",
        "as S3's",
    }
    left = s3.client.list_objects_v2(Bucket=servers.bucket.removeprefix("s3://")).get("Contents", [])
    assert [entry["Key"] for entry in left] == []
    assert list(tmp_path.iterdir()) == []


def test_the_program_reads_the_servers_from_one_file(site: Site, s3, tmp_path: Path) -> None:
    """And neither Ray nor Prefect is imported for it, let alone started."""
    home = tmp_path / "d"
    home.mkdir()
    table = "".join(f'{name} = "{value}"\n' for name, value in s3.environment.items())
    (home / "site.toml").write_text(
        f'gpu = false\nport = {site.port}\nprefect = "{site.prefect}"\nmlflow = "{site.mlflow}"\ndata = "{site.data}"\n'
        f"[environment]\n{table}"
    )
    (home / "site.toml").chmod(0o600)
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("AWS_", "RAY_", "PREFECT_"))}
    done = subprocess.run(
        [sys.executable, "-c", _AND_WHAT_IT_IMPORTED],
        cwd=ROOT,
        env=kept | {"DIFFUSION_HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    findings, imported = done.stdout.splitlines()
    said = json.loads(findings)
    assert bad([Finding.model_validate(found) for found in said["findings"]]) == {}
    assert any(found["what"].startswith(f"{site.data}: list") for found in said["findings"])
    assert imported == "[]"
    assert list(home.iterdir()) == [home / "site.toml"]


@pytest.mark.parametrize(
    ("variables", "what", "mend"),
    [
        (
            {"AWS_SECRET_ACCESS_KEY": "wrong"},
            "the secret key does not belong to the key id",
            "set AWS_SECRET_ACCESS_KEY",
        ),
        (
            {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"},
            "connection: .*127.0.0.1:9",
            "start the server, or correct AWS_ENDPOINT_URL",
        ),
    ],
    ids=["secret", "down"],
)
def test_credentials_of_s3(site: Site, monkeypatch, variables: dict[str, str], what: str, mend: str) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found = bad(looked(site))
    assert set(found) == {"data", "bundles"}
    assert re.search(what, found["data"].what)
    assert re.search(mend, found["data"].mend)
    assert found["data"].state == "wrong"


def test_a_bucket_that_is_not_there(site: Site, s3) -> None:
    found = bad(looked(site.model_copy(update={"data": "s3://no-such-bucket/data"})))
    assert set(found) == {"data"}
    assert f"there is no such bucket at {s3.url}" in found["data"].what
    assert "create it, or correct the URI" in found["data"].mend


def test_permissions_that_are_missing_are_each_named(site: Site, s3, monkeypatch) -> None:
    for name, value in s3.credentials(GUEST).items():
        monkeypatch.setenv(name, value)
    findings = [found for found in looked(site) if found.check == "data"]
    assert {found.state for found in findings} == {"wrong"}
    permissions = {re.search(r"permission (s3:\w+)", found.mend)[1] for found in findings}
    assert permissions >= {"s3:ListBucket", "s3:PutObject"}


def test_servers_that_are_down(site: Site) -> None:
    down = f"http://127.0.0.1:{free_port()}"
    found = bad(looked(site.model_copy(update={"prefect": f"{down}/api", "mlflow": down, "ray": down[7:]})))
    assert set(found) == {"prefect", "mlflow", "ray"}
    assert all(
        f"nothing answers at {address}" in found[name].what for name, address in (("prefect", down), ("mlflow", down))
    )
    assert "prefect server start" in found["prefect"].mend
    assert "unset DIFFUSION_PREFECT" in found["prefect"].mend
    assert "mlflow server" in found["mlflow"].mend
    assert "ray start --head" in found["ray"].mend


def test_addresses_of_the_wrong_server(site: Site, servers: Servers) -> None:
    swapped = site.model_copy(update={"prefect": servers.mlflow, "mlflow": servers.prefect})
    found = bad(looked(swapped))
    assert set(found) == {"prefect", "mlflow"}
    assert "is no API of Prefect's" in found["prefect"].what
    assert "is no MLflow server" in found["mlflow"].what
    short = site.model_copy(update={"prefect": servers.prefect.removesuffix("/api")})
    assert bad(looked(short))["prefect"].mend.startswith(f"DIFFUSION_PREFECT={servers.prefect}")


@pytest.mark.parametrize(("ahead_s", "state"), [(30, "warning"), (-900, "wrong")])
def test_a_server_with_another_clock(site: Site, servers: Servers, ahead_s: float, state: str) -> None:
    with FaultyProxy(servers.mlflow, rate=0, ahead_s=ahead_s) as proxy:
        found = bad(looked(site.model_copy(update={"mlflow": proxy.url})))
    assert set(found) == {"clock"}
    assert found["clock"].state == state
    words = "behind" if ahead_s > 0 else "ahead of"
    seconds = re.search(rf"clock is (\d+) s {words} that of MLflow", found["clock"].what)
    assert abs(int(seconds[1]) - abs(ahead_s)) <= 2
    assert "timedatectl set-ntp true" in found["clock"].mend


def test_tables_of_another_version(tmp_path: Path, home: Path, champion) -> None:
    """Of an MLflow on SQLite, as one that was made by an older version has them."""
    from mlflow.store.db.utils import _get_latest_schema_revision

    assert newest_schema() == _get_latest_schema_revision()
    (tmp_path / "d").mkdir()
    database = shutil.copy(home / "mlflow.db", tmp_path / "d")
    site = Site(home=tmp_path / "d", gpu=False, port=free_port())
    assert "mlflow" not in bad(looked(site))
    with sqlite3.connect(database) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '451aebb31d03'")
    found = bad(looked(site))["mlflow"]
    assert found.state == "wrong"
    assert "451aebb31d03" in found.what
    assert f"mlflow db upgrade 'sqlite:///{database}'" in found.mend
    Path(database).write_bytes(b"no database")
    assert "cannot be read" in bad(looked(site))["mlflow"].what


def test_an_alias_whose_bundle_is_gone(home: Path, champion) -> None:
    site = Site(home=home, gpu=False, port=free_port())
    files, bundle = home / "mlflow-artifacts", Path(champion.uri)
    assert "registry" not in bad(looked(site))
    try:
        bundle.rename(home / "aside")
        assert "registry" not in bad(looked(site))  # MLflow has it, too
        files.rename(home / "files-aside")
        findings = [found for found in looked(site) if found.check == "registry"]
    finally:
        (home / "aside").rename(bundle)
        (home / "files-aside").rename(files)
    assert {found.state for found in findings} == {"wrong"}
    assert {found.what.partition(" ")[0] for found in findings} == {"smoke@champion", "smoke@challenger"}
    assert str(bundle) in findings[0].mend
    assert "diffusion rollback smoke --to VERSION" in findings[0].mend
