"""Who may read what is secret: the endpoint's keys, a site's file with credentials in it, Ray's token."""

import os
import shlex
import stat
from collections.abc import Iterator
from pathlib import Path

from diffusion.store.scrub import is_secret
from flows.doctor.finding import Asked, Finding, ok, told, warning, wrong
from flows.preflight import check_access
from flows.site import Site
from flows.site_file import site_file


def permissions(asked: Asked) -> Iterator[Finding]:
    """Of the files that are there.  One that can be read is damage done: what is in it may be known to others."""
    found = [*_keys(asked.site), *_site(asked.site), *_token(asked.site)]
    yield from found or (ok("permissions", "no file with secrets lies open"),)


def _keys(site: Site) -> Iterator[Finding]:
    path = site.access.keys
    if opened := _opened(path):
        yield wrong("keys", f"{path} can be read{opened}", f"`chmod 600 {shlex.quote(str(path))}`")
    try:
        check_access(site)
    except ValueError as error:  # damaged, or none though the network reaches the endpoint
        yield told("keys", error)


def _site(site: Site) -> Iterator[Finding]:
    try:
        file = site_file(type(site).model_fields, os.environ, site.home)
    except ValueError:  # told already, by whoever read the site
        return
    secrets = [name for name in file.environment if is_secret(name)]
    if secrets and (opened := _opened(file.path)):
        what = f"{file.path} holds {', '.join(secrets)} and can be read{opened}"
        yield wrong("site file", what, f"`chmod 600 {shlex.quote(str(file.path))}`, and make new secrets")


def _token(site: Site) -> Iterator[Finding]:
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = (
        Path(named) if named else Path.home() / ".ray" / "auth_token" if site.ray else site.home / "ray" / "auth_token"
    )
    if opened := _opened(path):
        what = f"{path} can be read{opened}, and whoever has it runs programs on the cluster"
        yield warning("ray token", what, f"`chmod 600 {shlex.quote(str(path))}`")


def _opened(path: Path) -> str:
    """Words where others than its owner may read or write it; none where they may not, or it is not there."""
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
    except OSError:
        return ""
    return f" by others (mode {mode:o})" if mode & 0o077 else ""
