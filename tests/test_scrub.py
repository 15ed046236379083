"""What is secret in a text is hidden, wherever a text of others goes, and what is none stays."""

import os
import re
from pathlib import Path
from urllib.parse import quote

import pytest
import typer
from hypothesis import example, given
from hypothesis import strategies as st
from sqlalchemy.engine import make_url

from diffusion.data.sources import BadSource, open_source
from diffusion.store.s3 import S3Prefix
from diffusion.store.scrub import HIDDEN, holds_password, is_secret, scrubbed, without_passwords
from diffusion.store.storage import StorageRefused
from flows.foreground import reported
from flows.site import Site

SECRET = "hush-hush"
PORT = re.compile(r"\d{1,5}[/?#),;\]]")


@given(st.text(st.characters(codec="ascii", exclude_characters=" \t\n\r\x0b\x0c\x1c\x1d\x1e\x1f\"'<>@"), min_size=1))
@example("a/b#c?d")
@example("12345")
def test_a_password_that_sqlalchemy_takes_out_of_an_address_is_seen(password: str) -> None:
    """As it stands or in percents; only what looks like a port and a path is taken for that."""
    address = f"postgresql://me:{password}@db.example.org:5432/mlflow"
    assert make_url(address).password
    assert holds_password(address) or PORT.match(password)
    assert holds_password(f"postgresql://me:{quote(password, safe='')}@db.example.org/mlflow")
    assert holds_password(f"s3://AKIA:{password}@bucket/prefix")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"http://me:{SECRET}@host:5000/api", f"http://me:{HIDDEN}@host:5000/api"),
        (f"no answer from 'https://me:{SECRET}@h/a', again", f"no answer from 'https://me:{HIDDEN}@h/a', again"),
        (f"redis://:{SECRET}@host", f"redis://:{HIDDEN}@host"),
        (f"s3://AKIA:1/{SECRET}@bucket/p", f"s3://AKIA:{HIDDEN}@bucket/p"),
        (f"postgresql://db/x?user=me&password={SECRET}&a=1", f"postgresql://db/x?user=me&password={HIDDEN}&a=1"),
        (f"https://b/o?X-Amz-Signature={SECRET}&X-Amz-Date=1", f"https://b/o?X-Amz-Signature={HIDDEN}&X-Amz-Date=1"),
        (f"http://h/?key={SECRET}", f"http://h/?key={HIDDEN}"),
    ],
)
def test_passwords_in_addresses_are_hidden(text: str, shown: str) -> None:
    assert without_passwords(text) == shown
    assert without_passwords(shown) == shown


@pytest.mark.parametrize(
    "address",
    [
        "http://127.0.0.1:5000/api",
        "http://host:5000/a/name@3",
        "http://[::1]:4200/x@y",
        "s3://bucket/pictures/2026:10/name@2x.png",
        "s3://bucket/shards/{000..012}.tar",
        "sqlite:////home/me/mlflow.db",
        "postgresql+psycopg://mlflow@db.example.org/mlflow",
        "models:/demo@champion",
        "http://h/?monkey=banana&steps=3",
        "nobody@example.org: at 12:30",
    ],
)
def test_what_holds_no_password_stays(address: str) -> None:
    assert without_passwords(address) == address


def test_values_of_secret_variables_are_hidden_and_others_stay() -> None:
    there = {
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "MLFLOW_TRACKING_PASSWORD": f"{SECRET}-2",
        "RAY_AUTH_TOKEN_PATH": "/a/token",
    }
    there |= {"TOKENIZERS_PARALLELISM": "false", "AWS_DEFAULT_REGION": "us-east-1"}
    text = f"{SECRET} {SECRET}-2 /a/token false us-east-1"
    assert scrubbed(text, there) == f"{HIDDEN} {HIDDEN} /a/token false us-east-1"


@pytest.mark.parametrize(
    "name", ["AWS_SECRET_ACCESS_KEY", "DIFFUSION_KEY", "MLFLOW_CRYPTO_KEK_PASSPHRASE", "PGPASSWORD"]
)
def test_names_of_secrets(name: str) -> None:
    assert is_secret(name)
    assert not is_secret(f"{name}_FILE")
    assert not is_secret("DIFFUSION_MONKEY")


def test_an_error_is_told_and_written_without_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", SECRET)
    log = tmp_path / "log"

    def work() -> None:
        try:
            raise OSError(f"of a library: http://me:{SECRET}@host refused")
        except OSError as error:
            raise RuntimeError(f"sent {SECRET}") from error

    with pytest.raises(typer.Exit), reported(debug=False, log=log):
        work()
    said = "".join(capfd.readouterr())
    assert "sent (hidden)" in said
    assert "http://me:(hidden)@host refused" in log.read_text()
    assert SECRET not in said + log.read_text()


@pytest.mark.parametrize("source", [f"s3://AKIA:a/{SECRET}@bucket/p", f"https://me:{SECRET}@host/pictures.zip"])
def test_a_source_holds_no_password(source: str) -> None:
    with pytest.raises(BadSource, match="holds no password") as refused:
        open_source(source)
    assert SECRET not in str(refused.value)


def test_addresses_of_servers_hold_no_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = f"http://me:{SECRET}@127.0.0.1:9"
    monkeypatch.setenv("PREFECT_API_URL", address)
    with pytest.raises(ValueError, match=r"PREFECT_API_URL holds a password.*PREFECT_API_AUTH_STRING") as refused:
        Site(home=tmp_path / "d").prepare()
    assert SECRET not in str(refused.value)
    assert not os.path.exists(tmp_path / "d")
    monkeypatch.setenv("AWS_ENDPOINT_URL", address)
    with pytest.raises(StorageRefused, match="AWS_ENDPOINT_URL holds a password") as refused:
        S3Prefix("s3://bucket").size("x")
    assert SECRET not in str(refused.value)
