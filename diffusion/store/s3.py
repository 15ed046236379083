"""An S3 prefix as a Storage.  Settings are boto3's own: AWS_ENDPOINT_URL, AWS_PROFILE, AWS_DEFAULT_REGION, ~/.aws.

One policy of asking again (`retry.Patience`), botocore's own being off.  What arrives is compared with what was asked
for: every read names its range, and an answer of another length is no answer; what is sent carries its MD5.  That the
bytes are the right ones is for their reader to check, who knows their sha256.
"""

import hashlib
import os
import re
import time
from base64 import b64encode
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeVar
from uuid import uuid4

from diffusion.store.publish import replacing
from diffusion.store.retry import Passing, Patience, ask
from diffusion.store.s3_errors import CORRECT, Changed, NoUpload, PastEnd, understood
from diffusion.store.scrub import holds_password
from diffusion.store.storage import S3_SCHEME, Found, StorageRefused, StorageUnavailable, check_name, check_prefix

_MOST_PARTS = 10_000  # of a multipart upload, by S3's rules; a part has 5 MiB or more
_CHUNK = 2**18  # bytes taken from a socket at once
PART_BYTES = 2**24  # of what is read and written in parts
_TRANSFERS = 4  # parts under way at once, of one put or fetch
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}")

T = TypeVar("T")


class _Object(NamedTuple):
    size: int
    mark: str  # ETag
    upload: str  # what _Upload wrote on it


class S3Prefix:
    """The objects of a bucket whose keys begin with a prefix.  Safe to use from threads, after a fork, and pickled.

    part_bytes: objects larger than this are read and written in parts of this size (S3 wants 5 MiB or more), four at once.
    check: gives a name back, or refuses it; `any_name` where other people have named the objects.
    """

    def __init__(
        self,
        uri: str,
        *,
        patience: Patience = Patience(),
        part_bytes: int = PART_BYTES,
        check: Callable[[str], str] = check_name,
    ) -> None:
        self.bucket, self.prefix = _parsed(uri)
        self.uri = f"{S3_SCHEME}{self.bucket}/{self.prefix}".rstrip("/")
        self.patience, self.part_bytes, self._check = patience, part_bytes, check

    def read(self, name: str, start: int = 0, size: int | None = None) -> bytes:
        if size == 0:
            self._found(name)
            return b""
        try:
            return self._get(name, start, size, b"".join)[0]
        except PastEnd:
            return b""

    def size(self, name: str) -> int | None:
        try:
            return self._found(name).size
        except FileNotFoundError:
            return None

    def walk(self, prefix: str = "") -> Iterator[Found]:
        beginning, more, last = self.prefix + check_prefix(prefix), {}, ""
        while True:
            page = self._ask(prefix, "list_objects_v2", Prefix=beginning, **more)
            for entry in page.get("Contents", ()):
                name = entry["Key"].removeprefix(self.prefix)
                if not name or name.endswith("/"):  # consoles make such empty objects for folders
                    continue
                if name <= last:
                    raise StorageRefused(
                        f"{self.uri} lists {name!r} after {last!r}: an order by name is needed, which S3's directory"
                        " buckets do not give. Use a general purpose bucket"
                    )
                last = self._check(name)
                yield Found(name, entry["Size"], entry["ETag"].strip('"'))
            if not page.get("IsTruncated"):
                return
            more = {"ContinuationToken": page["NextContinuationToken"]}

    def put(self, name: str, data: bytes | Path) -> None:
        self._check(name)
        if isinstance(data, bytes):
            self._put(name, len(data), lambda start, size: data[start : start + size])
            return
        with open(data, "rb") as file:
            total = os.fstat(file.fileno()).st_size

            def part(start: int, size: int) -> bytes:
                got = os.pread(file.fileno(), size, start)
                if len(got) != min(size, total - start):
                    raise ValueError(f"{data} became shorter while it was stored as {self._place(name)}")
                return got

            self._put(name, total, part)

    def fetch(self, name: str, target: Path) -> None:
        def attempt() -> None:
            try:
                with replacing(target) as file:
                    self._fill(name, file)
            except Changed as error:
                raise Passing("changed while read", str(error)) from error

        ask(self._place(name), attempt, self.patience)

    def remove(self, name: str) -> None:
        with suppress(FileNotFoundError):
            self._ask(name, "delete_object", Key=self._key(name))

    def _place(self, name: str) -> str:
        return f"{self.uri}/{name}".rstrip("/")

    def _key(self, name: str) -> str:
        return self.prefix + self._check(name)

    def _ask(self, name: str, function: str, **arguments: object) -> dict:
        """One function of boto3's client, asked again while it fails in passing."""
        return self._asked(name, lambda client: getattr(client, function)(Bucket=self.bucket, **arguments))

    def _asked(self, name: str, attempt: Callable[[object], T]) -> T:
        def once() -> T:
            with understood(self._place(name), os.environ.get("AWS_ENDPOINT_URL", "AWS")):
                return attempt(_client(self.patience))

        return ask(self._place(name), once, self.patience)

    def _found(self, name: str) -> _Object:
        """Raises FileNotFoundError."""
        key = self._key(name)

        def attempt(client) -> dict | None:
            from botocore.exceptions import ClientError

            try:
                return client.head_object(Bucket=self.bucket, Key=key)
            except ClientError as error:
                if 400 <= error.response["ResponseMetadata"]["HTTPStatusCode"] < 500:
                    return None
                raise

        head = self._asked(name, attempt)
        if head is None:  # an answer to HEAD has no body, which would say whether key, bucket or permission is missing
            head = self._ask(name, "get_object", Key=key)
            head["Body"].close()
        return _Object(head["ContentLength"], head["ETag"], head.get("Metadata", {}).get("upload", ""))

    def _get(
        self, name: str, start: int, size: int | None, use: Callable[[Iterable[bytes]], T], mark: str | None = None
    ) -> tuple[T, _Object]:
        """`use` of the bytes [start, start + size) as they come, called afresh at every attempt; and the whole object.

        mark: of what the object must be, or Changed is raised.  PastEnd where there are no such bytes.
        """
        stop = "" if size is None else start + size - 1
        arguments = {"Key": self._key(name), "Range": f"bytes={start}-{stop}"} | ({"IfMatch": mark} if mark else {})

        def attempt(client) -> tuple[T, _Object]:
            answer = client.get_object(Bucket=self.bucket, **arguments)
            with answer["Body"] as body:
                expected, whole = _check_range(answer, start, size)
                return use(_chunks(body, expected, self.patience)), _Object(whole, answer["ETag"], "")

        return self._asked(name, attempt)

    def _fill(self, name: str, file: BinaryIO) -> None:
        """Write the whole object into an empty file, in parts, several at once."""

        def part(start: int, mark: str | None = None) -> _Object:
            def write(chunks: Iterable[bytes]) -> None:
                place = start
                for chunk in chunks:
                    place += os.pwrite(file.fileno(), chunk, place)

            return self._get(name, start, self.part_bytes, write, mark)[1]

        try:
            found = part(0)
        except PastEnd:  # an empty object
            return
        starts = range(self.part_bytes, found.size, self.part_bytes)
        if starts:
            with ThreadPoolExecutor(_TRANSFERS, thread_name_prefix="s3-fetch") as pool:
                list(pool.map(lambda start: part(start, found.mark), starts))

    def _put(self, name: str, total: int, part: Callable[[int, int], bytes]) -> None:
        """Store `total` bytes, of which `part(start, size)` gives some."""
        if total > self.part_bytes:
            _Upload(self, name, total, part).run()
            return
        body = part(0, total)
        self._ask(name, "put_object", Key=self._key(name), Body=body, ContentMD5=_md5(body))


def any_name(name: str) -> str:
    """`name`: as a key of S3 it leads nowhere else, whatever it is."""
    return name


class _Upload:
    """A multipart upload: parts in any order, then all of them become the object, or none does."""

    def __init__(self, storage: S3Prefix, name: str, total: int, part: Callable[[int, int], bytes]) -> None:
        self.storage, self.name, self.total, self.part = storage, name, total, part
        self.part_bytes = max(storage.part_bytes, -(-total // _MOST_PARTS))
        self.mark = uuid4().hex  # tells this upload's object from any other

    def run(self) -> None:
        begun = self._ask("create_multipart_upload", Metadata={"upload": self.mark})["UploadId"]
        try:
            with ThreadPoolExecutor(_TRANSFERS, thread_name_prefix="s3-put") as pool:
                numbered = enumerate(range(0, self.total, self.part_bytes), 1)
                parts = list(pool.map(lambda at: self._send(begun, *at), numbered))
            self._complete(begun, parts)
        except BaseException:
            # Where this fails too, the parts stay, unseen, as does an empty upload whose id got lost on the way back:
            # a bucket's rule AbortIncompleteMultipartUpload removes both.
            with suppress(NoUpload, StorageRefused, StorageUnavailable):
                self._ask("abort_multipart_upload", UploadId=begun)
            raise

    def _send(self, upload: str, number: int, start: int) -> dict:
        body = self.part(start, self.part_bytes)
        sent = self._ask("upload_part", UploadId=upload, PartNumber=number, Body=body, ContentMD5=_md5(body))
        return {"PartNumber": number, "ETag": sent["ETag"]}

    def _complete(self, upload: str, parts: list[dict]) -> None:
        try:
            self._ask("complete_multipart_upload", UploadId=upload, MultipartUpload={"Parts": parts})
        except NoUpload as error:  # done already, if it was the first answer that got lost
            if self.storage._found(self.name).upload != self.mark:
                raise StorageUnavailable(f"{error}: the upload was removed by somebody else; put it again") from error
        found = self.storage._found(self.name)
        if found.upload == self.mark and found.size != self.total:
            raise StorageUnavailable(
                f"{self.storage.uri}/{self.name} has {found.size:,} bytes where {self.total:,} were sent: put it again"
            )

    def _ask(self, function: str, **arguments: object) -> dict:
        return self.storage._ask(self.name, function, Key=self.storage._key(self.name), **arguments)


def _parsed(uri: str) -> tuple[str, str]:
    """s3://bucket/some/prefix -> "bucket", "some/prefix/".  Raises StorageRefused."""
    bucket, _, prefix = uri.removeprefix(S3_SCHEME).partition("/")
    prefix = prefix.strip("/")
    if {"@", ":"} & set(bucket):  # of a key with a slash in it, as every other has, what comes before that
        raise StorageRefused(
            "an s3:// URI holds no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY instead"
        )
    if not uri.startswith(S3_SCHEME) or not _BUCKET.fullmatch(bucket):
        raise StorageRefused(f"{uri!r} is no place on S3: write s3://bucket/prefix")
    return bucket, check_name(prefix) + "/" if prefix else ""


def _check_range(answer: dict, start: int, size: int | None) -> tuple[int, int]:
    """Bytes that the answer to a ranged request will bring, bytes of the whole object.  Raises Passing where the answer
    is not of the range asked for.
    """
    status, told = answer["ResponseMetadata"]["HTTPStatusCode"], answer.get("ContentRange", "")
    found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", told)
    if status != 206 or not found:
        raise Passing("wrong answer", f"status {status} and range {told!r} to a ranged request")
    first, last, whole = map(int, found.groups())
    wanted = whole if size is None else min(start + size, whole)
    if (first, last + 1) != (start, wanted):
        raise Passing("wrong answer", f"{told} where {start}-{wanted - 1} was asked for")
    announced = answer.get("ContentLength", wanted - start)  # a chunked answer announces nothing
    if announced != wanted - start:
        raise Passing("wrong length", f"{announced:,} bytes are announced where {wanted - start:,} were asked for")
    return wanted - start, whole


def _chunks(body, expected: int, patience: Patience) -> Iterator[bytes]:
    """What comes from the socket, as it comes.  Raises Passing where it comes too slowly."""
    began, since, got = time.monotonic(), 0, 0
    while got < expected:
        chunk = body.read1(min(_CHUNK, expected - got))
        if not chunk:
            raise Passing("short body", f"{got:,} of {expected:,} bytes came")
        got, since = got + len(chunk), since + len(chunk)
        if (passed_s := time.monotonic() - began) > patience.silent_s:
            if since < patience.slowest * passed_s:
                raise Passing("slow body", f"{since:,} bytes in {passed_s:.1f} s")
            began, since = time.monotonic(), 0
        yield chunk


def _md5(body: bytes) -> str:
    return b64encode(hashlib.md5(body, usedforsecurity=False).digest()).decode()


def _client(patience: Patience):
    """This process's client for the settings as they are now."""
    settings = tuple(sorted((key, value) for key, value in os.environ.items() if key.startswith("AWS_")))
    return _made_client(os.getpid(), settings, patience.connect_s, patience.silent_s)


@lru_cache(maxsize=8)
def _made_client(pid: int, settings: tuple, connect_s: float, silent_s: float):
    import boto3
    from botocore.config import Config

    for name, value in settings:
        if name.startswith("AWS_ENDPOINT_URL") and holds_password(value):
            raise StorageRefused(
                f"{name} holds a password, which errors would show: leave it out; S3 asks for AWS_ACCESS_KEY_ID and"
                " AWS_SECRET_ACCESS_KEY"
            )
    config = Config(
        connect_timeout=connect_s,
        read_timeout=silent_s,
        retries={"total_max_attempts": 1},
        max_pool_connections=32,
        request_checksum_calculation="when_required",  # the MD5 that we send does it
        response_checksum_validation="when_required",
    )
    try:
        return boto3.session.Session().client("s3", config=config)
    except ValueError as error:  # "Invalid endpoint: ..."
        raise StorageRefused(f"{error}. {CORRECT}") from error
