"""The id that a client may give a request.  It stands in answers, logs and traces, so not everything can be one."""

HEADER = "X-Request-ID"
_LONGEST = 128  # characters


def is_sane(given: str) -> bool:
    """Whether it is kept: printable ASCII, not empty, not long."""
    return 0 < len(given) <= _LONGEST and given.isascii() and given.isprintable()
