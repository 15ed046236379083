"""Ports for servers of the tests."""

import os
import random
import socket

_AT = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 2
_given: set[int] = set()


def free_port() -> int:
    """One of the loopback's that nobody listens on and that is given once.

    From 20000 to 32000: above those of Ray's workers, below those that the system gives to whoever asks for any, who
    else might have it before the server that it is for.  Of pytest's processes each has ports of its own.
    """
    for _ in range(1_000):
        port = 2 * random.randrange(10_000, 16_000) + _AT
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        if port not in _given:
            _given.add(port)
            return port
    raise RuntimeError("no port of 20000 to 32000 is free")
