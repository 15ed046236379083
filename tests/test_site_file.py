"""What a site's file says counts where nothing nearer says otherwise, and what is wrong in it is named."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flows.site import Site
from flows.site_file import hidden
from tests.commands import command, on

ROOT = Path(__file__).parents[1]


def written(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_an_option_wins_over_a_variable_that_over_the_file_and_that_over_the_default(tmp_path: Path) -> None:
    written(tmp_path / "site.toml", 'port = 1\nhost = "::1"\nworkers = "2:8"\nreplicas = [1, 3]\n')
    variables = {"DIFFUSION_HOME": str(tmp_path), "DIFFUSION_PORT": "2", "DIFFUSION_HOST": "localhost"}
    site = Site.from_environment(variables, port=3)
    assert (site.port, site.host, site.workers, site.replicas, site.idle_s) == (3, "localhost", (2, 8), (1, 3), 60)
    assert Site.from_environment({"DIFFUSION_PORT": "2"}, home=tmp_path).port == 2
    assert Site.from_environment({}, home=tmp_path).port == 1


def test_a_file_elsewhere_is_named_and_its_folders_lie_beside_it(tmp_path: Path) -> None:
    file = written(tmp_path / "etc" / "team.toml", 'home = "../d"\ndata = "pictures"\nruns = "s3://bucket/runs"\n')
    site = Site.from_environment({"DIFFUSION_SITE": str(file)})
    assert site.home == tmp_path / "d"
    assert (site.data, site.runs) == (str(tmp_path / "etc" / "pictures"), "s3://bucket/runs")
    assert Site.from_environment({"DIFFUSION_SITE": str(file)}, home=tmp_path).home == tmp_path
    with pytest.raises(ValueError, match=r"nowhere\.toml cannot be read.*DIFFUSION_SITE"):
        Site.from_environment({"DIFFUSION_SITE": str(tmp_path / "nowhere.toml")})


def test_variables_of_libraries_are_set_where_they_are_not(tmp_path: Path) -> None:
    text = '[environment]\nAWS_PROFILE = "team"\nAWS_ENDPOINT_URL = "http://s3"\nAWS_EC2_METADATA_DISABLED = true\n'
    written(tmp_path / "site.toml", text)
    variables = {"AWS_PROFILE": "mine"}
    Site.from_environment(variables, home=tmp_path)
    assert variables == {
        "AWS_PROFILE": "mine",
        "AWS_ENDPOINT_URL": "http://s3",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('mlfow = "http://m"', r"there is no setting mlfow; did you mean mlflow\?"),
        ("xyzzy = 1", r"there is no setting xyzzy\. There are home, data, runs"),
        ('DIFFUSION_RAY = "auto"', "DIFFUSION_RAY: in the file it is called ray"),
        ('AWS_PROFILE = "team"', r"AWS_PROFILE: it is a variable, and belongs below a line \[environment\]"),
        ('home = "/x"', "home: leave it out, for the file lies in the home"),
        ('environment = "AWS"', "environment is a table of variables"),
        ('[environment]\nAWS_ENDPOINT_URI = "x"', r"AWS_ENDPOINT_URI is no variable; did you mean AWS_ENDPOINT_URL\?"),
        ('[environment]\nPATH = "x"', "PATH: only variables of the libraries are set here: AWS_"),
        ('[environment]\nPREFECT_API_URL = "x"', r"PREFECT_API_URL: write prefect = \.\.\. above"),
        ('[environment]\nDIFFUSION_PORT = "1"', r"DIFFUSION_PORT: write port = \.\.\. above"),
        ("[environment]\nAWS_PROFILE = []", "AWS_PROFILE: write a text"),
        ("port = 70000", r"port=70000: .*65535.* \(port in .*site\.toml\)"),
        ("port =", "site.toml is no TOML"),
    ],
)
def test_what_is_wrong_in_the_file_is_named(tmp_path: Path, text: str, says: str) -> None:
    written(tmp_path / "site.toml", text)
    with pytest.raises(ValueError, match=says):
        Site.from_environment({}, home=tmp_path)


def test_all_wrong_keys_are_named_at_once(tmp_path: Path) -> None:
    written(tmp_path / "site.toml", 'portt = 1\nrayy = "auto"\n[environment]\nAWS_PROFIL = "x"\n')
    with pytest.raises(ValueError, match=r"(?s)mean port.*mean ray.*mean AWS_PROFILE"):
        Site.from_environment({}, home=tmp_path)


@pytest.mark.parametrize(
    ("field", "address", "instead"),
    [
        ("mlflow", "http://me:hush@mlflow:5000", "MLFLOW_TRACKING_PASSWORD"),
        ("mlflow", "postgresql+psycopg://me:hush@db/mlflow", "PGPASSWORD"),
        ("prefect", "https://me:hush@prefect/api", "PREFECT_API_AUTH_STRING"),
        ("mlflow", "postgresql://me:a#hush@db/mlflow", "PGPASSWORD"),  # SQLAlchemy takes it so
        ("mlflow", "postgresql://db/mlflow?user=me&password=hush", "PGPASSWORD"),
        ("data", "s3://AKIA:ab/hush+cd@bucket/prefix", "AWS_SECRET_ACCESS_KEY"),
        ("runs", "https://me:hush@host/x", "give a folder"),
    ],
)
def test_a_site_holds_no_password_and_no_error_shows_one(field: str, address: str, instead: str) -> None:
    with pytest.raises(ValueError, match=instead) as error:
        Site.from_environment({f"DIFFUSION_{field.upper()}": address})
    assert "hush" not in str(error.value)


def test_a_prefect_server_of_the_site_is_the_one_that_libraries_see(tmp_path: Path) -> None:
    assert Site(home=tmp_path, prefect="http://p/api").environment()["PREFECT_API_URL"] == "http://p/api"
    assert "PREFECT_API_URL" not in Site(home=tmp_path).environment()


def test_a_cluster_has_a_token_of_its_own(tmp_path: Path) -> None:
    assert "RAY_AUTH_TOKEN_PATH" in Site(home=tmp_path).environment()
    assert "RAY_AUTH_TOKEN_PATH" not in Site(home=tmp_path, ray="head:6379").environment()


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("AWS_SECRET_ACCESS_KEY", "abc", "(hidden)"),
        ("AWS_ACCESS_KEY_ID", "abc", "(hidden)"),
        ("MLFLOW_TRACKING_PASSWORD", "abc", "(hidden)"),
        ("PREFECT_API_AUTH_STRING", "a:b", "(hidden)"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "authorization=x", "(hidden)"),
        ("RAY_AUTH_TOKEN", "abc", "(hidden)"),
        ("RAY_AUTH_TOKEN_PATH", "/etc/token", "/etc/token"),
        ("PREFECT_API_URL", "http://me:hush@host/api", "http://me:(hidden)@host/api"),
        ("AWS_ENDPOINT_URL", "http://s3:9000", "http://s3:9000"),
        ("DIFFUSION_KEY", "dk-abc", "(hidden)"),
        ("DIFFUSION_NOTIFY", "https://hooks.example.org/T0/B0/abc", "(hidden)"),
        ("RAY_REDIS_PASSWORD", "", ""),
    ],
)
def test_secrets_are_hidden(name: str, value: str, shown: str) -> None:
    assert hidden(name, value) == shown


def test_the_command_says_what_is_set_and_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = written(
        tmp_path / "site.toml", 'mlflow = "http://m"\nport = 1\n[environment]\nAWS_SECRET_ACCESS_KEY = "hush"\n'
    )
    for name in [name for name in os.environ if name.startswith(("DIFFUSION_", "AWS_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("DIFFUSION_PORT", "4321")
    monkeypatch.setenv("AWS_PROFILE", "mine")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush")  # as the file's is, when it is read the second time
    on(Site.from_environment(home=tmp_path), monkeypatch, "cli_site", guards=("looking",))
    code, said = command("site", "--home", tmp_path)
    lines = said.splitlines()
    assert code == 0
    assert f'mlflow = "http://m"  # {file}' in lines
    assert "port = 4321  # DIFFUSION_PORT" in lines
    assert f'home = "{tmp_path}"  # the option' in lines
    assert 'ray = "none"' in lines
    assert 'AWS_PROFILE = "mine"  # variable' in lines
    assert f'AWS_SECRET_ACCESS_KEY = "(hidden)"  # {file}' in lines
    assert "hush" not in said


def test_a_flow_in_a_worker_finds_the_file_by_its_variable(tmp_path: Path) -> None:
    """As a Prefect worker's process would: another folder, nothing but the variable."""
    file = written(tmp_path / "site.toml", 'home = "d"\n[environment]\nAWS_PROFILE = "team"\n')
    program = "import os; from flows.site import Site; print(Site.from_environment().home, os.environ['AWS_PROFILE'])"
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("DIFFUSION_", "AWS_"))}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=kept | {"DIFFUSION_SITE": str(file), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.split() == [str(tmp_path / "d"), "team"], done.stderr


def test_a_site_can_be_handed_on_as_variables() -> None:
    site = Site(workers=(2, 8), gpu=False, port=4321, data="s3://bucket/x", ray_ship=True)
    assert Site.from_environment(site.variables()) == site
