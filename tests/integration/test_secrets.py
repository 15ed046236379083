"""The program on a bucket with real keys, and with secrets of all other kinds planted: nothing that it writes holds one."""

import json
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from tests.leaks import PLANTED, leaks
from tests.program import Place, running
from tests.s3_server import S3Server


def test_a_leak_is_found(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "log").write_bytes(b"\0GET /?t=planted%2Fs3%2Bsecret%2Fof-forty-characters-012\n")
    (tmp_path / "well").write_text("nothing")
    assert leaks(PLANTED, [tmp_path]) == [f"{tmp_path}/deep/log: AWS_SECRET_ACCESS_KEY"]
    assert leaks(PLANTED, [], "as bWU6cGxhbnRlZC1wcmVmZWN0LXBhc3N3b3Jk says") == ["said: PREFECT_API_AUTH_STRING"]


def test_sharding_a_bucket_looking_and_failing_leave_no_secret(
    place: Place, s3: S3Server, emoji_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in s3.environment:  # they come from the site's file alone
        monkeypatch.delenv(name, raising=False)
    secrets = {name: value for name, value in PLANTED.items() if not name.startswith("AWS_")}
    place = replace(place, also=secrets)
    secrets |= {"AWS_SECRET_ACCESS_KEY": s3.environment["AWS_SECRET_ACCESS_KEY"]}
    place.home.mkdir()
    site = place.home / "site.toml"
    site.touch(mode=0o600)
    data = s3.bucket()
    lines = [
        f'data = "{data}/data"',
        "[environment]",
        *(f"{name} = {json.dumps(value)}" for name, value in s3.environment.items()),
    ]
    site.write_text("\n".join(lines))
    archive = place.root / "pictures.zip"
    with zipfile.ZipFile(archive, "w") as packed:
        for path in sorted(emoji_folder.rglob("*.png")):
            packed.write(path, path.relative_to(emoji_folder))
    s3.client.upload_file(str(archive), data.removeprefix("s3://"), "pictures.zip")
    archive.unlink()

    def said(*words: str, code: int | None = 0) -> str:
        with running(place, *words) as process:
            told = process.communicate(timeout=200)[0]
        assert code in (None, process.returncode), told
        return told

    shard = ("shard", "--preset", "smoke", "--source")
    told = [said(*shard, f"{data}/pictures.zip"), said("site"), said("doctor", code=None)]
    assert "✓ shard" in told[0]
    assert 'AWS_SECRET_ACCESS_KEY = "(hidden)"' in told[1]
    assert 'DIFFUSION_KEY = "(hidden)"' in told[1]
    told.append(said(*shard, f"{data}/nothing.zip", code=2))
    key = secrets["AWS_SECRET_ACCESS_KEY"]
    told.append(said(*shard, f"s3://me:{key[:9]}/{key}@bucket/x", code=2))
    assert "holds no password" in told[-1]
    place.wait_for_end()
    site.unlink()
    assert leaks(secrets, [place.root], *told) == []
    logs = "".join(path.read_text(errors="replace") for path in (place.home / "logs").iterdir())
    assert "holds no password" in logs, "the traceback of what failed was among what was looked at"
