"""What a failure of boto3 means: gone by itself (`Passing`), not there, or a refusal that people must act on."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from diffusion.store.retry import Passing
from diffusion.store.storage import StorageRefused

_PASSING = {  # codes that come with a status below 500
    "BadDigest",  # what arrived is not what was sent
    "IncompleteBody",
    "OperationAborted",
    "RequestTimeout",
    "RequestTimeoutException",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "XAmzContentSHA256Mismatch",
}
_MISSING = {"NoSuchKey", "NoSuchVersion"}
_LIST = "s3:ListBucket"
_PERMISSION = {
    "GetObject": "s3:GetObject",
    "HeadObject": "s3:GetObject",
    "ListObjectsV2": _LIST,
    "DeleteObject": "s3:DeleteObject",
}
_REFUSED = {
    "NoSuchBucket": "there is no such bucket at {endpoint}: create it, or correct the URI or AWS_ENDPOINT_URL",
    "InvalidBucketName": "the bucket's name is not a valid one: correct the URI",
    "InvalidAccessKeyId": "the key id is not known at {endpoint}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or"
    " AWS_PROFILE, to those of an account there",
    "SignatureDoesNotMatch": "the secret key does not belong to the key id: set AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, to"
    " the right one",
    "AccessDenied": "these credentials do not allow it: ask the bucket's owner for the permission {permission}{beside},"
    " or set AWS_PROFILE to an account that has it",
    "ExpiredToken": "the session has expired: log in again (`aws sso login`), or set fresh AWS_* variables",
    "InvalidToken": "the session token is not valid: log in again (`aws sso login`), or unset AWS_SESSION_TOKEN",
}
_REGION = {"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"}
CORRECT = "Correct the AWS_* variables or ~/.aws/config"


class PastEnd(Exception):
    """The range begins behind the object's end."""


class Changed(Exception):
    """The object is another one by now."""


class NoUpload(Exception):
    """The multipart upload is not there (any more)."""


@contextmanager
def understood(uri: str, endpoint: str = "the endpoint") -> Iterator[None]:
    """Turns what boto3 and urllib3 raise in the block, asking for `uri`, into Passing, FileNotFoundError, StorageRefused,
    PastEnd, Changed or NoUpload.
    """
    from botocore import exceptions
    from botocore.parsers import ResponseParserError
    from urllib3.exceptions import HTTPError, TimeoutError

    try:
        yield
    except StorageRefused:  # a ValueError, and an answer already
        raise
    except exceptions.ClientError as error:
        raise _answered(error, uri, endpoint) from error
    except (exceptions.ConnectTimeoutError, exceptions.ReadTimeoutError, TimeoutError) as error:
        raise Passing("timeout", str(error)) from error
    except (ResponseParserError, ValueError) as error:  # ValueError: of a header that holds no number
        raise Passing("unreadable answer", str(error)) from error
    except (exceptions.ConnectionError, exceptions.HTTPClientError, exceptions.IncompleteReadError, HTTPError) as error:
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            raise StorageRefused(
                f"{uri}: the certificate of {endpoint} is not trusted here: set AWS_CA_BUNDLE to the file of its authority"
                f" ({error})"
            ) from error
        raise Passing("short body" if "IncompleteRead" in repr(error) else "connection", str(error)) from error
    except (exceptions.NoCredentialsError, exceptions.PartialCredentialsError) as error:
        raise StorageRefused(
            f"{uri}: no credentials are found ({error}): set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE,"
            " or write them with `aws configure`"
        ) from error
    except exceptions.BotoCoreError as error:  # a profile or region that makes no sense, and all that is left
        raise StorageRefused(f"{uri}: {error}. {CORRECT}") from error


def _answered(error, uri: str, endpoint: str) -> Exception:
    """What an error answer of the server means."""
    answer, said = error.response.get("ResponseMetadata", {}), error.response.get("Error", {})
    status, code = answer.get("HTTPStatusCode", 0), str(said.get("Code", ""))
    headers, message = answer.get("HTTPHeaders", {}), said.get("Message", "")
    if code in _PASSING or status == 429 or (status >= 500 and status != 501):
        return Passing(f"{status}" if code.isdecimal() else f"{status} {code}", message)
    if code in _MISSING:
        return FileNotFoundError(f"{uri} does not exist")
    special = {"InvalidRange": PastEnd, "PreconditionFailed": Changed, "NoSuchUpload": NoUpload}
    if code in special:
        return special[code](f"{uri}: {message}")
    if code == "RequestTimeTooSkewed":
        return StorageRefused(f"{uri}: {_skew(headers)}: set the clock (`timedatectl set-ntp true`) and try again")
    region = said.get("Region") or headers.get("x-amz-bucket-region") or _expected_region(message)
    if code in _REGION and region:
        return StorageRefused(f"{uri}: the bucket is in the region {region}: set AWS_DEFAULT_REGION={region}")
    if code in _REFUSED:
        permission = _PERMISSION.get(error.operation_name, "s3:PutObject")
        beside = f" (and {_LIST}, without which a missing object is reported so too)" if permission != _LIST else ""
        told = _REFUSED[code].format(endpoint=endpoint, permission=permission, beside=beside)
        return StorageRefused(f"{uri}: {told}")
    if not code or code.isdecimal():  # no reason is given: the answer was cut, or it is not an S3 server that answers
        return Passing("unreadable answer", f"status {status} of {endpoint} without S3's reason, if it is an S3 server")
    return StorageRefused(f"{uri}: {endpoint} refuses {error.operation_name}: {code} ({status}) {message}".rstrip())


def _expected_region(message: str) -> str | None:
    found = re.search(r"expecting '([a-z0-9-]+)'", message)
    return found and found[1]


def now() -> datetime:
    """What this computer's clock says."""
    return datetime.now(UTC)


def _skew(headers: dict[str, str]) -> str:
    try:
        ahead_s = (now() - parsedate_to_datetime(headers["date"])).total_seconds()
    except (KeyError, ValueError, TypeError):
        return "this computer's clock differs too much from the server's"
    return f"this computer's clock is {abs(ahead_s):,.0f} s {'ahead of' if ahead_s > 0 else 'behind'} the server's"
