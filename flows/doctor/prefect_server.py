"""The Prefect server: it answers, reaches its database, lets us in, and is of this program's version."""

from collections.abc import Iterator
from importlib.metadata import version

from flows.doctor.finding import Asked, Finding, ok, warning, wrong
from flows.doctor.http import Silent, ask, prefect_headers, prefect_url
from flows.site_file import hidden


def prefect(asked: Asked) -> Iterator[Finding]:
    url = prefect_url(asked.site.prefect)
    if url is None:
        yield ok("prefect", f"embedded: Prefect {version('prefect')} starts a temporary server for each command")
        return
    try:
        yield from _server(url)
    except Silent as silent:
        without = "or unset DIFFUSION_PREFECT and PREFECT_API_URL, to do without one"
        yield wrong("prefect", str(silent), f"start it, `prefect server start` on its machine, {without}")


def _server(url: str) -> Iterator[Finding]:
    shown = hidden("", url)
    ready = ask(f"{url}/ready")
    if ready.status == 404:
        yield _no_api(shown, "404")
        return
    if ready.status != 200:
        what = f"the server at {shown} does not reach its database ({ready.status})"
        yield wrong("prefect", what, "start the database that PREFECT_API_DATABASE_CONNECTION_URL of the server names")
        return
    told = ask(f"{url}/admin/version", headers=prefect_headers())
    if told.status in (401, 403):
        yield wrong(
            "prefect",
            f"the server at {shown} does not let us in ({told.status})",
            "PREFECT_API_AUTH_STRING=USER:PASSWORD, as the server's, or PREFECT_API_KEY",
        )
        return
    theirs, ours = told.json, version("prefect")
    if told.status != 200:
        yield wrong("prefect", f"{shown} answers {told.status} for its version", "look at the server's log")
    elif not isinstance(theirs, str):  # a page
        yield _no_api(shown, "a page")
    elif theirs.split(".")[:2] != ours.split(".")[:2]:
        what = f"the server at {shown} is Prefect {theirs}, and this program has {ours}"
        yield wrong(
            "prefect", what, f"`pip install prefect=={ours}` on the server, then `prefect server database upgrade`"
        )
    elif theirs != ours:
        what = f"the server at {shown} is Prefect {theirs}, and this program has {ours}"
        yield warning("prefect", what, f"`pip install prefect=={ours}` on the server, before they drift apart")
    else:
        yield ok("prefect", f"{shown} answers: Prefect {theirs}, and its database")


def _no_api(url: str, instead: str) -> Finding:
    mend = "correct the address" if url.endswith("/api") else f"DIFFUSION_PREFECT={url}/api, if that is Prefect's"
    return wrong("prefect", f"{url} is no API of Prefect's ({instead} in its place)", mend)
