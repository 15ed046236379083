"""Keys are kept as hashes, followed while an endpoint runs, and bounded in rate and number at once."""

import hashlib
import hmac
import json
import logging
import os
import re
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from itertools import accumulate
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffusion.serving.keys import Access, Bucket, Keyring, NoKey, TooMany, add, is_loopback, read, remove
from flows.site import Site
from tests.commands import command, on


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "home" / "keys.json"


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@given(st.integers(1, 600), st.lists(st.integers(0, 30_000), max_size=80))
def test_a_bucket_gives_no_more_than_its_law_and_no_less(per_minute: int, gaps_ms: list[int]) -> None:
    bucket, times = Bucket(per_minute, 0.0), list(accumulate(gaps_ms))
    taken = [ms for ms in times if bucket.take(ms / 1000) == 0]
    for i, first in enumerate(taken):
        for j in range(i, len(taken)):
            assert j - i + 1 <= per_minute + Fraction(per_minute * (taken[j] - first), 60_000) + Fraction(1, 10**6)
    left, before, exactly = Fraction(per_minute), 0, []  # the same in fractions
    for ms in times:
        left, before = min(Fraction(per_minute), left + Fraction(per_minute * (ms - before), 60_000)), ms
        if left >= 1:
            left -= 1
            exactly.append(ms)
        elif 1 - left < Fraction(1, 10**6):
            return  # rounding may decide otherwise here
    assert taken == exactly


@given(st.floats(0.01, 600), st.lists(st.floats(0, 100), max_size=20))
def test_who_waits_as_long_as_told_is_let_in(per_minute: float, gaps_s: list[float]) -> None:
    bucket, now = Bucket(per_minute, 0.0), 0.0
    for gap in gaps_s:
        now += gap
        if wait := bucket.take(now):
            assert 0 < wait <= 60 / per_minute
            assert bucket.take(now + 0.9 * wait) > 0
            now += wait * (1 + 1e-9) + 1e-9
            assert bucket.take(now) == 0


def test_a_clock_that_goes_back_gives_nothing() -> None:
    bucket = Bucket(1, 100.0)
    assert bucket.take(100.0) == 0
    assert bucket.take(0.0) == bucket.take(0.0) == 60
    assert bucket.take(100.0) == 60


def test_a_key_is_kept_as_its_hash_alone_and_read_by_its_owner_alone(path: Path) -> None:
    secrets = [add(path, "web", rate=60, concurrency=2), add(path, "night")]
    assert all(re.fullmatch(r"dk-[A-Za-z0-9_-]{43}", secret) for secret in secrets)
    assert len({*secrets}) == 2
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    text = path.read_text()
    assert not any(secret[3:] in text for secret in secrets)
    web, night = read(path)
    assert web.sha256 == hashlib.sha256(secrets[0].encode()).hexdigest()
    assert (web.name, web.rate, web.concurrency) == ("web", 60, 2)
    assert (night.name, night.rate, night.concurrency) == ("night", None, None)


@pytest.mark.parametrize(
    ("name", "limits", "says"),
    [
        ("web", {}, "there is a key web already"),
        ("a b", {}, "no name of a key"),
        ("x" * 65, {}, "no name of a key"),
        ("web\n", {}, "no name of a key"),
        ("new", {"rate": 0}, "rate"),
        ("new", {"rate": float("nan")}, "rate"),
        ("new", {"concurrency": 0}, "concurrency"),
    ],
)
def test_what_cannot_be_a_key_is_refused_and_changes_nothing(path: Path, name: str, limits: dict, says: str) -> None:
    add(path, "web")
    before = path.read_bytes()
    with pytest.raises(ValueError, match=says):
        add(path, name, **limits)
    with pytest.raises(ValueError, match="there is no key nobody: web"):
        remove(path, "nobody")
    assert path.read_bytes() == before


def test_keys_that_are_made_at_once_are_all_kept(path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: add(path, f"key{i}"), range(24)))
    assert {key.name for key in read(path)} == {f"key{i}" for i in range(24)}


def test_a_ring_follows_its_file(path: Path) -> None:
    ring = Keyring(Access(keys=path))
    assert not ring.wanted
    first = add(path, "first")
    assert ring.wanted
    second = add(path, "second")
    assert (ring.holder(first).name, ring.holder(second).name) == ("first", "second")
    remove(path, "first")
    assert ring.holder(second).name == "second"
    with pytest.raises(NoKey, match="not known"):
        ring.holder(first)
    for nothing in (None, "", "second", "dk-", second[:-1], second + "\udcff"):
        with pytest.raises(NoKey):
            ring.holder(nothing)
    assert remove(path, "second") == ()
    assert not ring.wanted


def test_nothing_but_removing_its_keys_opens_an_endpoint(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    secret = add(path, "web")
    ring = Keyring(Access(keys=path))
    with caplog.at_level(logging.WARNING):
        path.write_text("{")
        assert ring.wanted
        assert ring.holder(secret).name == "web"
        assert "is damaged" in caplog.text
        path.unlink()
        assert ring.wanted
        assert ring.holder(secret).name == "web"
        assert "is gone" in caplog.text
    path.write_text(json.dumps({"keys": [{"name": "x"}]}))
    with pytest.raises(ValueError, match=r"is damaged \(keys\.0\.sha256.*diffusion keys add NAME"):
        Keyring(Access(keys=path))
    path.unlink()
    needed = Keyring(Access(keys=path, needed=True))  # beyond loopback
    assert needed.wanted
    with pytest.raises(NoKey):
        needed.holder(secret)


def test_a_request_is_compared_with_every_key(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = [add(path, f"key{i}") for i in range(3)]
    ring, compared, inner = Keyring(Access(keys=path)), [], hmac.compare_digest
    monkeypatch.setattr("hmac.compare_digest", lambda a, b: compared.append(a) or inner(a, b))
    assert [ring.holder(secret).name for secret in secrets] == ["key0", "key1", "key2"]
    assert compared == [key.sha256 for key in read(path)] * 3


def test_a_key_has_its_rate_and_its_number_at_once(path: Path) -> None:
    clock = Clock()
    add(path, "web", rate=2, concurrency=1)
    add(path, "free")
    ring = Keyring(Access(keys=path), clock=clock)
    web, free = read(path)
    with ring.using(web):
        with pytest.raises(TooMany, match="may ask for 1 at once") as many, ring.using(web):
            pass
        with ring.using(free), ring.using(free):
            pass
    with pytest.raises(KeyError), ring.using(web):  # one that fails counts, and is over; the one refused above did not
        raise KeyError
    with pytest.raises(TooMany, match="2 times a minute: ask again in 30 s") as fast, ring.using(web):
        pass
    assert [(error.value.reason, error.value.retry_after_s) for error in (many, fast)] == [
        ("concurrency", 1),
        ("rate", 30),
    ]
    add(path, "another")  # what was used stays used when the file changes
    assert ring.wanted
    clock.now += 29
    with pytest.raises(TooMany, match="in 1 s"), ring.using(web):
        pass
    clock.now += 1
    with ring.using(web):
        pass


@pytest.mark.parametrize(
    ("host", "loopback"),
    [(host, True) for host in ("127.0.0.1", "127.8.0.1", "::1", "localhost")]
    + [(host, False) for host in ("0.0.0.0", "::", "10.0.0.1", "example.org", "127.0.0.1.example")],
)
def test_loopback(host: str, loopback: bool) -> None:
    assert is_loopback(host) == loopback


def test_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = Site(home=tmp_path / "home")
    on(site, monkeypatch, "cli_keys", guards=("guarded", "looking"))
    assert "there is no key" in command("keys", "list")[1]
    said = command("keys", "add", "web", "--rate", 60, "--concurrency", 2, "--priority", "low")[1]
    (secret,) = re.findall(r"dk-[\w-]{43}", said)
    assert Keyring(site.access).holder(secret).name == "web"
    assert secret not in command("keys", "list")[1]
    assert re.search(r"web +made \d{4}-.*60 requests a minute, 2 at once, low priority", command("keys", "list")[1])
    assert read(site.access.keys)[0].priority == "low"
    with pytest.raises(ValueError, match="priority: it must be 'high', 'normal' or 'low'"):
        command("keys", "add", "other", "--priority", "urgent")
    assert "it was the last" in command("keys", "remove", "web")[1]
    assert read(site.access.keys) == ()


def test_a_key_can_be_revoked_where_the_disk_has_no_room_for_a_run(tmp_path: Path) -> None:
    """Nor a rollback, which is let in the same way."""
    mount = f"mount -t tmpfs -o size=1m none {tmp_path}"
    program = (sys.executable, "-c", "from flows.cli import main; main()", "keys")
    both = f"""sh -c '{mount} && "$@" add web && "$@" remove web' sh "$@" """
    done = subprocess.run(
        ["sh", "-c", f"exec unshare --user --map-root-user --mount {both}", "sh", *program],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"DIFFUSION_HOME": str(tmp_path / "d")},
        capture_output=True,
        text=True,
        timeout=100,
    )
    if not done.stdout and ("unshare" in done.stderr or "mount" in done.stderr):
        pytest.skip(f"no file system of our own can be had here: {done.stderr.strip()}")
    assert (done.returncode, "the key web is not known any more" in done.stdout) == (0, True), done.stderr
