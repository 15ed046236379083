"""What of a text is secret: passwords in addresses, and values of variables whose names say so.  People, logs, Prefect and
MLflow get the rest.

An address is looked at as whoever uses it does, and these differ: SQLAlchemy takes a password with `/` or `#` in it as it
stands, where `urllib` sees none, and every second secret key of S3 has a `/`.
"""

import os
import re
from collections.abc import Mapping

HIDDEN = "(hidden)"
_SHORTEST = 8  # characters of a value that is looked for in texts: "true" and "1" stand in many
_NAMES = re.compile(
    r"SECRET|PASSWORD|PASSPHRASE|TOKEN|CREDENTIAL|API_KEY|ACCESS_KEY|AUTH_STRING|HEADERS|NOTIFY|(^|_)KEY$"
)
_PLACES = re.compile(r"_(PATH|FILE)$")  # where one is, not what it is
_USER = r"""[^\s:/?#@\["'<>]*"""
_PORT = r"""\d{1,5}(?:[/?#),;\]\s"'<>]|$)"""
# user:password@, up to the word's last @.  A number after the colon is a port, but for S3, which has none.
_IN_AN_ADDRESS = re.compile(
    rf"""((?:s3://{_USER}|[a-z][a-z0-9+.-]*://{_USER}(?!:{_PORT})):)[^\s"'<>]+(?=@)""", re.IGNORECASE
)
_IN_A_QUERY = re.compile(
    r"""([?&](?:[\w.-]*(?:password|passwd|secret|token|signature|credential|api_?key|access_?key)[\w.-]*|key|sig)=)"""
    r"""[^&\s"'<>\#]+""",
    re.IGNORECASE,
)


def is_secret(name: str) -> bool:
    """Whether a variable of this name holds a secret."""
    return bool(_NAMES.search(name)) and not _PLACES.search(name)


def without_passwords(text: str) -> str:
    """A text, or an address alone, with `(hidden)` in place of the passwords in its addresses."""
    return _IN_A_QUERY.sub(rf"\1{HIDDEN}", _IN_AN_ADDRESS.sub(rf"\1{HIDDEN}", text))


def holds_password(address: str) -> bool:
    return without_passwords(address) != address


def scrubbed(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """A text of others, such as an exception's, without what is secret here: passwords in addresses, and what variables
    with secrets hold."""
    values = {value for name, value in environment.items() if is_secret(name) and len(value) >= _SHORTEST}
    for value in sorted(values, key=len, reverse=True):  # one may hold another
        text = text.replace(value, HIDDEN)
    return without_passwords(text)
