"""The endpoint: it is well where it runs, and its port is free where it does not."""

import socket
from collections.abc import Iterator

from flows.doctor.finding import Asked, Finding, ok, told, warning, wrong
from flows.doctor.http import Answer, Silent, ask
from flows.preflight import check_port
from flows.site import Site

_CONNECT_S = 2.0
_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def endpoint(asked: Asked) -> Iterator[Finding]:
    site = asked.site
    host = _EVERYWHERE.get(site.host, site.host)
    url = f"http://{f'[{host}]' if ':' in host else host}:{site.port}"
    if _listens(host, site.port):
        try:
            yield from _judged(url, ask(f"{url}/healthz", patience_s=_CONNECT_S), site)
        except Silent as silent:
            yield _other(url, str(silent))
        return
    if site.ray is not None:  # it would listen on a node, which may be this machine or not
        yield ok("endpoint", f"none answers at {url}; the cluster would have it at its head")
        return
    try:
        check_port(site)
        yield ok("endpoint", f"none runs; port {site.port} is free")
    except ValueError as error:
        yield told("endpoint", error)


def _judged(url: str, answer: Answer, site: Site) -> Iterator[Finding]:
    state = answer.json
    if not isinstance(state, dict) or "status" not in state or "loaded" not in state:
        yield _other(url, f"status {answer.status} for /healthz")
        return
    if answer.status != 200:
        what = f"the endpoint at {url} says: {state['status']}"
        yield wrong("endpoint", what, f"look at {site.logs}, and start it again: `diffusion deploy`")
        return
    yield ok("endpoint", f"{url} answers")
    if refused := state.get("refused"):
        what = f"the endpoint refused {refused['model']} version {refused['version']}: {refused['reason']}"
        yield warning(
            "endpoint", what, "`diffusion verify` looks whether its bundle is whole; the one before serves on"
        )


def _other(url: str, why: str) -> Finding:
    port = url.rpartition(":")[2]
    mend = f"end it (`ss -ltnp sport = :{port}` names it), or choose another port: DIFFUSION_PORT=N"
    return wrong("endpoint", f"another program listens at {url} ({why})", mend)


def _listens(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=_CONNECT_S):
            return True
    except OSError:
        return False
