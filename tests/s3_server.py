"""A real S3 server on loopback: OpenStack Swift with its S3 interface, one process, one replica on a plain folder.

It lies in an environment of its own (`make_environment`), since its pins are not ours.  This file is both sides: what the
tests call, and, run as a program by that environment's Python, the server.  No root, no fixed port; it ends with the test
process, however that ends.
"""

import fcntl
import hashlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

REQUIREMENTS = Path(__file__).with_name("s3-requirements.txt")
USER, GUEST = "s3:test", "s3:guest"  # the guest has a key and no right to anything


class NoServer(Exception):
    """The server cannot be had here; says why in one sentence."""


class Request(NamedTuple):
    """A line of the access log.  `range` is the Range header or "-"; sent counts the answer's body."""

    status: int
    method: str
    path: str
    query: str
    range: str
    sent: int


class S3Server:
    """A running server.  `environment`: what boto3 reads, to be put into os.environ.  Listings come in pages
    of 100.
    """

    def __init__(self, url: str, keys: dict[str, str], log: Path) -> None:
        self.url, self._keys, self._log = url, keys, log
        self.environment = {
            "AWS_ENDPOINT_URL": url,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            **self.credentials(USER),
        }
        self._buckets = 0

    def credentials(self, user: str) -> dict[str, str]:
        return {"AWS_ACCESS_KEY_ID": user, "AWS_SECRET_ACCESS_KEY": self._keys[user]}

    @cached_property
    def client(self):
        """A plain boto3 client, for what a test needs beside the code it tests."""
        import boto3

        keys = {"aws_access_key_id": USER, "aws_secret_access_key": self._keys[USER]}
        return boto3.session.Session().client("s3", endpoint_url=self.url, region_name="us-east-1", **keys)

    def bucket(self) -> str:
        """The URI of a new, empty bucket."""
        self._buckets += 1
        name = f"test-{os.getpid()}-{self._buckets}"
        self.client.create_bucket(Bucket=name)
        return f"s3://{name}"

    def requests(self) -> list[Request]:
        """Every request answered so far.  Take the length first to see what comes after."""
        return [Request(*line) for line in map(json.loads, self._log.read_text().splitlines())]


def make_environment() -> Path:
    """The Python of the server's environment, made beside the tests' own on first use.  Raises NoServer."""
    folder = Path(sys.prefix) / "s3-server"
    mark, wanted = folder / ".ready", hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()
    python = folder / "bin" / "python"
    if mark.is_file() and mark.read_text() == wanted:  # written last
        return python
    if not os.access(folder.parent, os.W_OK):
        raise NoServer(f"no S3 server: {folder} cannot be made, since {folder.parent} is not writable")
    with open(folder.with_name(".s3-server.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if mark.is_file() and mark.read_text() == wanted:
            return python
        shutil.rmtree(folder, ignore_errors=True)
        pip = (str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps")
        for command in ((sys.executable, "-m", "venv", str(folder)), (*pip, "-r", str(REQUIREMENTS))):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                shutil.rmtree(folder, ignore_errors=True)
                why = (done.stderr.strip() or done.stdout.strip() or "?").splitlines()[-1]
                raise NoServer(f"no S3 server: OpenStack Swift cannot be installed ({why})")
        mark.write_text(wanted)
    return python


@contextmanager
def s3_server() -> Iterator[S3Server]:
    """A fresh server, empty, for the length of the block.  Raises NoServer."""
    python = make_environment()
    folder = Path(tempfile.mkdtemp(prefix="s3-"))
    keys = {user: secrets.token_hex(20) for user in (USER, GUEST)}
    try:
        with (
            open(folder / "errors", "wb") as errors,
            subprocess.Popen(
                [python, __file__, str(folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env={"PATH": os.defpath, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONWARNINGS": "ignore"},
                start_new_session=True,
            ) as process,
        ):
            try:
                process.stdin.write(json.dumps(keys).encode() + b"\n")
                process.stdin.flush()
                ready = process.stdout.readline()
                if not ready:
                    raise NoServer(f"no S3 server: {(folder / 'errors').read_text().strip().splitlines()[-1]}")
                yield S3Server(ready.decode().strip(), keys, folder / "access.log")
            finally:
                process.kill()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# --- the server's side ------------------------------------------------------------------------------------------------

_PROXY = """
[pipeline:main]
pipeline = catch_errors gatekeeper listing_formats bulk s3api tempauth copy slo proxy-server
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
node_timeout = 60
recoverable_node_timeout = 60
object_chunk_size = 1048576
client_chunk_size = 1048576
[filter:s3api]
use = egg:swift#s3api
location = us-east-1
dns_compliant_bucket_names = true
max_bucket_listing = 100
[filter:tempauth]
use = egg:swift#tempauth
{users}
[filter:slo]
use = egg:swift#slo
rate_limit_segments_per_sec = 0
concurrency = 4
[filter:catch_errors]
use = egg:swift#catch_errors
[filter:gatekeeper]
use = egg:swift#gatekeeper
[filter:listing_formats]
use = egg:swift#listing_formats
[filter:bulk]
use = egg:swift#bulk
[filter:copy]
use = egg:swift#copy
"""


class _Cache(dict):
    """What Swift asks of memcached, in the one process: tempauth insists on one."""

    def get(self, key, raise_on_error=False, **_):
        value, until = super().get(key, (None, 0))
        return json.loads(value) if value is not None and (not until or until > time.time()) else None

    def set(self, key, value, serialize=True, time=0, **_):
        from time import time as now

        self[key] = (json.dumps(value), now() + time if time else 0)

    def incr(self, key, delta=1, time=0, **_):
        value = max(0, (self.get(key) or 0) + delta)
        self.set(key, value, time=time)
        return value

    def delete(self, key, **_):
        self.pop(key, None)


def _logged(app, path: Path):
    """WSGI: hand every request the cache, and write it to the access log before the last byte of its answer is sent, so
    that a client which has its answer finds it there.
    """
    cache = _Cache()
    log = open(path, "a", buffering=1)  # noqa: SIM115  for as long as the process lives

    def logged(env, start_response):
        env["swift.cache"] = cache
        status, announced = "0", None
        what = (
            env["REQUEST_METHOD"],
            env.get("RAW_PATH_INFO") or env["PATH_INFO"],
            env.get("QUERY_STRING", ""),
            env.get("HTTP_RANGE", "-"),
        )

        def start(line, headers, *rest):
            nonlocal status, announced
            status = line[:3]
            announced = next((int(value) for name, value in headers if name.lower() == "content-length"), None)
            return start_response(line, headers, *rest)

        sent, written, chunks = 0, False, app(env, start)
        try:
            for chunk in chunks:
                sent += len(chunk)
                if sent == announced and not written:
                    log.write(json.dumps([int(status), *what, sent]) + "\n")
                    written = True
                yield chunk
        finally:
            if hasattr(chunks, "close"):
                chunks.close()
            if not written:
                log.write(json.dumps([int(status), *what, sent]) + "\n")

    return logged


def _serve(folder: Path) -> None:
    """Account, container, object and proxy server in one process; ends when its standard input does."""
    from swift.common import utils

    utils.monkey_patch()
    import eventlet
    import eventlet.debug
    import eventlet.wsgi

    eventlet.debug.hub_exceptions(False)
    os.fsync = os.fdatasync = lambda _: None  # tests need no durability, and this is most of a small PUT
    users = json.loads(sys.stdin.readline())
    (folder / "swift.conf").write_text(
        f"[swift-hash]\nswift_hash_path_suffix = {secrets.token_hex(8)}\n[storage-policy:0]\nname = one\ndefault = yes\n"
    )
    utils.set_swift_dir(str(folder))
    from swift.account.server import AccountController
    from swift.common import ring, wsgi
    from swift.container.server import ContainerController
    from swift.obj.server import ObjectController

    (folder / "node" / "d1").mkdir(parents=True)
    probe = folder / "node" / "probe"
    probe.touch()
    try:
        os.setxattr(probe, "user.swift", b"x")
    except OSError as error:
        sys.exit(f"{folder} takes no extended attributes ({error.strerror}): point TMPDIR elsewhere")
    conf = {
        "devices": str(folder / "node"),
        "mount_check": "false",
        "swift_dir": str(folder),
        "recon_cache_path": str(folder),
        "disable_fallocate": "true",
        "fallocate_reserve": "0",
        "log_address": str(folder / "no-syslog"),
        "log_level": "CRITICAL",
        "node_timeout": "60",
        "container_update_timeout": "60",  # a listing is right as soon as a PUT returns
        "disk_chunk_size": "1048576",
        "network_chunk_size": "1048576",
        "replication_concurrency": "0",
    }

    def start(app, sock=None) -> int:
        sock = sock or eventlet.listen(("127.0.0.1", 0))
        eventlet.spawn(
            eventlet.wsgi.server,
            sock,
            app,
            utils.NullLogger(),
            capitalize_response_headers=False,  # SDKs look for ETag
            protocol=wsgi.SwiftHttpProtocol,
            custom_pool=eventlet.GreenPool(1024),
        )
        return sock.getsockname()[1]

    for kind, made in (
        ("account", AccountController),
        ("container", ContainerController),
        ("object", ObjectController),
    ):
        sock = eventlet.listen(("127.0.0.1", 0))
        builder = ring.RingBuilder(4, 1, 0)
        place = {"ip": "127.0.0.1", "port": sock.getsockname()[1], "device": "d1", "weight": 1.0, "meta": ""}
        builder.add_dev({"id": 0, "region": 1, "zone": 1, **place})
        builder.rebalance()
        builder.get_ring().save(str(folder / f"{kind}.ring.gz"))
        start(made(conf), sock)
    lines = "\n".join(
        f"user_{name.replace(':', '_')} = {key}{' .admin' if name == USER else ''}" for name, key in users.items()
    )
    common = "[DEFAULT]\n" + "".join(f"{key} = {value}\n" for key, value in conf.items())
    app = wsgi.loadapp(wsgi.ConfigString(common + _PROXY.format(users=lines)))
    port = start(_logged(app, folder / "access.log"))
    print(f"http://127.0.0.1:{port}", flush=True)
    eventlet.hubs.trampoline(sys.stdin.fileno(), read=True)  # until the tests' process has died without a word
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
