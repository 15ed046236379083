"""Ports for servers of the tests."""

import socket


def free_port() -> int:
    """One of the loopback's that nobody listens on, and none of 8000 to 8999, which others may expect to have."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return port if not 8000 <= port < 9000 else free_port()
