"""S3 against a real server: the laws of a storage, refusals in words, and whatever a network may do."""

import hashlib
import os
import random
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from urllib.parse import parse_qs

import pytest
from hypothesis import HealthCheck, given, settings

from diffusion.store.cache import ShardCache
from diffusion.store.retry import Patience, retries
from diffusion.store.s3 import S3Prefix
from diffusion.store.storage import StorageRefused, StorageUnavailable
from tests.faulty_proxy import FLIPPED, KINDS, FaultyProxy
from tests.s3_server import GUEST, Request, S3Server
from tests.storage_laws import LAWS, OPERATIONS, behaves_as_a_dict

ROOT = Path(__file__).parents[2]
PART = 5 * 2**20  # the smallest part of a multipart upload
QUICK = Patience(attempts=5, first_s=0.001, longest_s=0.01)


@pytest.fixture
def storage(s3: S3Server) -> S3Prefix:
    return S3Prefix(f"{s3.bucket()}/some prefix/é", patience=QUICK, part_bytes=PART)


@contextmanager
def seen(s3: S3Server) -> Iterator[list[Request]]:
    """The requests that the server answered during the block."""
    before, requests = len(s3.requests()), []
    yield requests
    requests += s3.requests()[before:]


@contextmanager
def proxied(s3: S3Server, **arguments: object) -> Iterator[FaultyProxy]:
    """A proxy that spoils nothing yet, where os.environ leads to."""
    with FaultyProxy(s3.url, **{"rate": 0.0, **arguments}) as proxy, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_laws(law, storage: S3Prefix, tmp_path: Path):
    law(storage, tmp_path)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(operations=OPERATIONS)
def test_behaves_as_a_dict(s3: S3Server, operations):
    behaves_as_a_dict(S3Prefix(s3.bucket(), patience=QUICK), operations)


def test_a_prefix_sees_its_own_objects_alone(s3):
    bucket = s3.bucket()
    for uri in (bucket, f"{bucket}/a", f"{bucket}/ab", f"{bucket}/a/b"):
        S3Prefix(uri).put("x", uri.encode())
    assert [found.name for found in S3Prefix(f"{bucket}/a").walk()] == ["b/x", "x"]
    assert S3Prefix(f"{bucket}/a").read("b/x") == f"{bucket}/a/b".encode()
    assert [found.name for found in S3Prefix(bucket).walk()] == ["a/b/x", "a/x", "ab/x", "x"]


def test_a_key_may_be_an_object_and_a_folder_and_folder_markers_are_none(s3, storage):
    for name in ("a", "a/b"):
        storage.put(name, b"1")
    for key in ("", "a/", "c/"):
        s3.client.put_object(Bucket=storage.bucket, Key=storage.prefix + key, Body=b"")
    assert [found.name for found in storage.walk()] == ["a", "a/b"]


@pytest.mark.parametrize("key", ["../a", "a//b", "a/../../b", "a\\b", "a\nb", "/a", "./a"])
def test_keys_that_could_lead_elsewhere_are_refused_when_met(s3, key):
    bucket = s3.bucket()
    s3.client.put_object(Bucket=bucket.removeprefix("s3://"), Key=key, Body=b"")
    with pytest.raises(StorageRefused, match="names are relative, with '/', stay inside"):
        list(S3Prefix(bucket).walk())


def test_walking_asks_page_by_page_as_far_as_it_is_followed(s3, storage):
    client = s3.client
    pool = [threading.Thread(target=fill, args=(client, storage, range(i, 210, 4))) for i in range(4)]
    for thread in pool:
        thread.start()
    for thread in pool:
        thread.join()
    with seen(s3) as requests:
        assert [found.name for found in storage.walk()] == [f"{i:05d}" for i in range(210)]
    assert len(requests) == 3
    with seen(s3) as requests:
        walk = storage.walk()
        assert next(walk).name == "00000"
    assert len(requests) == 1


def fill(client, storage: S3Prefix, numbers: range) -> None:
    for i in numbers:
        client.put_object(Bucket=storage.bucket, Key=f"{storage.prefix}{i:05d}", Body=b"")


def test_a_read_is_one_request_for_its_range(s3, storage):
    storage.put("a", bytes(1000))
    with seen(s3) as requests:
        storage.read("a", 100, 50)
        storage.read("a")
    assert [(r.status, r.method, r.range, r.sent) for r in requests] == [
        (206, "GET", "bytes=100-149", 50),
        (206, "GET", "bytes=0-", 1000),
    ]


def test_a_large_file_goes_and_comes_in_parts(s3, storage, tmp_path):
    (tmp_path / "a").write_bytes(data := random.Random(0).randbytes(2 * PART + 12345))
    with seen(s3) as requests:
        storage.put("a", tmp_path / "a")
    parts = [r for r in requests if r.method == "PUT"]
    assert sorted(parse_qs(r.query)["partNumber"] for r in parts) == [["1"], ["2"], ["3"]]
    with seen(s3) as requests:
        storage.fetch("a", tmp_path / "b")
    assert sorted(r.sent for r in requests) == [12345, PART, PART]
    assert (tmp_path / "b").read_bytes() == data
    storage.put("a", data[: PART + 1])  # bytes are cut alike
    assert storage.size("a") == PART + 1
    with seen(s3) as requests:
        storage.put("a", data[:PART])  # of one part: one request
    assert len(requests) == 1


def uploads(s3: S3Server, storage: S3Prefix) -> list:
    return s3.client.list_multipart_uploads(Bucket=storage.bucket).get("Uploads", [])


def test_an_upload_that_fails_leaves_the_old_object_and_no_parts(s3, storage, tmp_path):
    storage.put("a", b"old")
    (tmp_path / "a").write_bytes(bytes(3 * PART))
    with proxied(s3, kinds=["500"], in_a_row=99) as proxy:
        proxy.fault = lambda request: "500" if "partNumber=2" in request else None
        with pytest.raises(StorageUnavailable, match=r"/a: 500 InternalError: injected \(asked 5 times"):
            storage.put("a", tmp_path / "a")
    assert storage.read("a") == b"old"
    assert uploads(s3, storage) == []

    def shrink(request: str) -> None:
        if "uploads" in request:
            os.truncate(tmp_path / "a", PART)

    with proxied(s3) as proxy:
        proxy.fault = shrink
        with pytest.raises(ValueError, match="became shorter while it was stored"):
            storage.put("a", tmp_path / "a")
    assert storage.read("a") == b"old"
    assert uploads(s3, storage) == []


def test_the_end_of_an_upload_may_get_lost_on_the_way_back(s3, storage):
    with proxied(s3, seed=1) as proxy:
        lost = iter(["reset after"])
        proxy.fault = lambda request: next(lost, None) if request.startswith("POST") and "uploadId" in request else None
        storage.put("a", data := bytes(PART + 1))
        assert proxy.injected == {"reset after": 1}
    assert storage.read("a") == data


def test_an_upload_that_somebody_removed_is_no_success(s3, storage):
    storage.put("a", b"old")
    with proxied(s3) as proxy:

        def abort(request: str) -> None:
            if request.startswith("POST") and "uploadId" in request:
                for upload in uploads(s3, storage):
                    s3.client.abort_multipart_upload(
                        Bucket=storage.bucket, Key=upload["Key"], UploadId=upload["UploadId"]
                    )

        proxy.fault = abort
        with pytest.raises(StorageUnavailable, match="the upload was removed by somebody else; put it again"):
            storage.put("a", bytes(PART + 1))
    assert storage.read("a") == b"old"


def test_an_object_replaced_while_it_is_fetched_is_fetched_whole(s3, storage, tmp_path):
    storage = S3Prefix(storage.uri, part_bytes=PART)  # patient: it waits while the object is replaced
    storage.put("a", bytes(2 * PART))
    new = b"\1" * (2 * PART + 1)
    with proxied(s3) as proxy:
        once = iter([None])

        def put_another(request: str) -> None:
            if f"bytes={PART}" in request and next(once, 0) is None:
                storage.put("a", new)

        proxy.fault = put_another
        before = retries()
        storage.fetch("a", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == new
    assert retries() - before == {"changed while read": 1}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_failure_is_asked_again_and_given_up_in_words(s3, storage, kind, tmp_path):
    storage.put("a", data := os.urandom(2000))
    if kind in ("stall", "trickle"):
        storage = S3Prefix(storage.uri, patience=replace(QUICK, silent_s=1.0))
    with proxied(s3, rate=1.0, kinds=[kind], in_a_row=2, stall_s=5.0) as proxy:
        before = retries()
        assert storage.read("a", 0, 2000) == data
        assert proxy.injected == {kind: 2}
        assert (retries() - before).total() == 2
        proxy.in_a_row = 99
        with pytest.raises(
            StorageUnavailable, match=r"/a: .* \(asked 5 times in .* s\)\. Nothing is lost: run the same"
        ):
            storage.fetch("a", tmp_path / "a")
    assert os.listdir(tmp_path) == []


def test_two_hundred_failures_change_nothing(s3, storage, tmp_path):
    """Every function, eight threads, a third of the requests spoilt: what is stored and read is exact."""
    generator = random.Random(7)
    # silence on a busy machine may come to what is injected
    storage = S3Prefix(storage.uri, patience=replace(QUICK, attempts=12, silent_s=3.0), part_bytes=PART)
    objects = {f"{i:03d}": generator.randbytes(generator.choice((0, 10, 3000, 100_000))) for i in range(60)}
    objects["large"] = generator.randbytes(2 * PART + 1)
    names, errors = sorted(objects), []

    def work(number: int) -> None:
        try:
            for name in names[number::8]:
                data = objects[name]
                (tmp_path / f"put-{name}").write_bytes(data)
                storage.put(name, tmp_path / f"put-{name}" if number % 2 else data)
                storage.put(f"gone-{name}", data[:100])
                assert storage.size(name) == len(data)
                assert storage.read(name, 3, 1000) == data[3:1003]
                assert storage.read(name) == data
                storage.fetch(name, tmp_path / f"got-{name}")
                assert (tmp_path / f"got-{name}").read_bytes() == data
                storage.remove(f"gone-{name}")
                assert storage.size(f"gone-{name}") is None
        except Exception as error:
            errors.append(error)

    kinds = [kind for kind in KINDS if kind not in ("stall", "trickle")] * 3 + [
        "stall"
    ]  # the slow ones are tested above
    with proxied(s3, seed=11, rate=0.4, kinds=kinds, stall_s=5.0) as proxy:
        before = retries()
        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        assert {found.name: found.size for found in storage.walk()} == {
            name: len(data) for name, data in objects.items()
        }
        assert proxy.injected.total() >= 200
        assert set(proxy.injected) == set(kinds)
        # an answer without a body is whole where the reset comes after it
        # an answer without a body is whole where the reset comes after it
        assert proxy.injected.total() - proxy.injected["reset after"] <= (retries() - before).total()
    # an upload whose id got lost on the way back stays, empty
    left = [(upload["Key"], upload["UploadId"]) for upload in uploads(s3, storage)]
    parts = [s3.client.list_parts(Bucket=storage.bucket, Key=key, UploadId=upload) for key, upload in left]
    assert not any(listed.get("Parts") for listed in parts)


def test_a_flipped_bit_is_found_by_the_cache(s3, storage, tmp_path):
    storage.put("a", data := os.urandom(100_000))
    asked = (storage, "a", hashlib.sha256(data).hexdigest(), len(data))
    with proxied(s3, rate=1.0, kinds=[FLIPPED], in_a_row=1) as proxy:
        assert ShardCache(tmp_path / "a", 2**20).path(*asked).read_bytes() == data
        assert proxy.injected == {FLIPPED: 1}
        proxy.in_a_row = 2
        with pytest.raises(ValueError, match=r"has sha256 .*, fetched twice"):
            ShardCache(tmp_path / "b", 2**20).path(*asked)
    assert os.listdir(tmp_path / "b") == []


_FILL = """
import sys
from diffusion.store.cache import ShardCache
from diffusion.store.storage import open_storage
folder, uri, *shards = sys.argv[1:]
cache, storage = ShardCache(folder, 30_000), open_storage(uri)
for shard in shards:
    name, sha256 = shard.split("=")
    with open(cache.path(storage, name, sha256, 10_000), "rb") as file:
        import hashlib
        assert hashlib.sha256(file.read()).hexdigest() == sha256
print("done")
"""


def test_processes_share_a_cache_of_a_bucket(s3, storage, tmp_path):
    shards = {f"{i}.tar": random.Random(i).randbytes(10_000) for i in range(3)}
    for name, data in shards.items():
        storage.put(name, data)
    arguments = [f"{name}={hashlib.sha256(data).hexdigest()}" for name, data in shards.items()]
    command = [sys.executable, "-c", _FILL, str(tmp_path / "cache"), storage.uri, *arguments]
    with seen(s3) as requests:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        workers = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) for _ in range(4)]
        assert [worker.communicate(timeout=60)[0] for worker in workers] == [b"done\n"] * 4
    assert Counter(request.method for request in requests) == {"GET": 3}


EVERY = {
    "read": lambda storage: storage.read("a"),
    "size": lambda storage: storage.size("a"),
    "walk": lambda storage: list(storage.walk()),
    "put": lambda storage: storage.put("a", b"1"),
    "large put": lambda storage: storage.put("a", bytes(PART + 1)),
    "remove": lambda storage: storage.remove("a"),
}


@pytest.mark.parametrize("function", EVERY)
def test_refusals_say_what_to_do(s3, storage, function, monkeypatch):
    before, call = retries(), EVERY[function]

    def refused(what: str, storage: S3Prefix = storage) -> None:
        with pytest.raises(StorageRefused, match=what):
            call(storage)

    if function != "remove":  # which is done where there is nothing to remove
        refused(
            "there is no such bucket at http://127.0.0.1:.*: create it",
            S3Prefix("s3://nothing-here/x", part_bytes=PART),
        )
    with monkeypatch.context() as patch:
        patch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        refused("the secret key does not belong to the key id: set AWS_SECRET_ACCESS_KEY")
    with monkeypatch.context() as patch:
        for key, value in s3.credentials(GUEST).items():
            patch.setenv(key, value)
        permission = {"read": "Get", "size": "Get", "remove": "Delete"}.get(function, "Put")
        wanted = "s3:ListBucket" if function == "walk" else f"s3:{permission}Object"
        beside = ", or set AWS_PROFILE" if function == "walk" else r" \(and s3:ListBucket"
        refused(f"do not allow it: ask the bucket's owner for the permission {wanted}{beside}")
    with monkeypatch.context() as patch:
        patch.delenv("AWS_ACCESS_KEY_ID")
        patch.delenv("AWS_SECRET_ACCESS_KEY")
        refused("no credentials are found .*: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE")
    with monkeypatch.context() as patch:
        patch.setenv("AWS_PROFILE", "nobody")
        refused(r"profile \(nobody\) could not be found. Correct the AWS_\* variables")
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", "nonsense")
        refused(r"Invalid endpoint: nonsense. Correct the AWS_\* variables")
    assert retries() == before  # none of it was asked twice


@pytest.mark.parametrize(("hours", "words"), [(3, "10,8.. s ahead of"), (-3, "10,[78].. s behind")])
def test_a_wrong_clock_is_named_with_its_difference(s3, storage, hours, words, monkeypatch):
    from botocore import auth

    storage.put("a", b"1")
    now = auth.get_current_datetime
    monkeypatch.setattr(auth, "get_current_datetime", lambda *args: now(*args) + timedelta(hours=hours))
    monkeypatch.setattr("diffusion.store.s3_errors.now", lambda: now(False) + timedelta(hours=hours))
    with pytest.raises(StorageRefused, match=rf"clock is {words} the server's: set the clock \(`timedatectl"):
        storage.read("a")
