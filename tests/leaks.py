"""Secrets that nobody could mistake for anything else, planted where programs get theirs, and who wrote them down."""

from base64 import b64encode
from collections.abc import Iterable, Mapping
from pathlib import Path
from urllib.parse import quote

PLANTED = {  # environment variables
    "AWS_ACCESS_KEY_ID": "AKIAPLANTEDPLANTED01",
    "AWS_SECRET_ACCESS_KEY": "planted/s3+secret/of-forty-characters-012",
    "AWS_SESSION_TOKEN": "planted-session-token-0123456789",
    "MLFLOW_TRACKING_USERNAME": "me",
    "MLFLOW_TRACKING_PASSWORD": "planted-mlflow-password",
    "PREFECT_API_AUTH_STRING": "me:planted-prefect-password",
    "PGPASSWORD": "planted-postgres-password",
    "RAY_AUTH_TOKEN": "planted-ray-token-0123456789abcdef0123456789",
    "DIFFUSION_KEY": "dk-planted-key-of-an-endpoint",
    "OTEL_EXPORTER_OTLP_HEADERS": "authorization=planted-collector-token",
}
_SHORTEST = 8


def spellings(secrets: Iterable[str]) -> dict[bytes, str]:
    """What to look for -> the secret: as it stands, in percents, in base64, the part behind a name or a user."""
    found = {}
    for secret in secrets:
        for part in {secret, secret.partition(":")[2], secret.partition("=")[2]}:
            if len(part) >= _SHORTEST:
                found |= dict.fromkeys((part.encode(), quote(part, safe="").encode(), b64encode(part.encode())), secret)
    return found


def leaks(secrets: Mapping[str, str], places: Iterable[Path], *texts: str) -> list[str]:
    """Files below the places that hold one of these secrets, and texts that do, with the secret's name."""
    names, found = {value: name for name, value in secrets.items()}, []
    files = [path for place in places for path in sorted(place.rglob("*")) if path.is_file() and not path.is_symlink()]
    assert files or not places
    for where, data in [*((str(path), _read(path)) for path in files), *(("said", text.encode()) for text in texts)]:
        found += [
            f"{where}: {names[secret]}" for spelling, secret in spellings(secrets.values()).items() if spelling in data
        ]
    return list(dict.fromkeys(found))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:  # a program that runs has removed it
        return b""
