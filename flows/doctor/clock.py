"""This computer's clock, against those of the servers that it asks."""

import os
from collections.abc import Iterator

from diffusion.store.storage import S3_SCHEME
from flows.doctor.finding import Asked, Finding, ok, warning, wrong
from flows.doctor.http import Silent, ask, prefect_url
from flows.site import Site

_NOTABLE_S, _WRONG_S = (
    5.0,
    60.0,
)  # S3 refuses at 15 minutes; long before that a schedule fires at other times than it says
_MEND = "`timedatectl set-ntp true` on the one that is wrong (`date -u` on both shows which)"


def clock(asked: Asked) -> Iterator[Finding]:
    """Servers that do not answer are told by their own checks."""
    compared = 0
    for name, url in _servers(asked.site).items():
        try:
            skew_s = ask(url, method="HEAD").skew_s
        except Silent:
            continue
        if skew_s is None:
            continue
        compared += 1
        if abs(skew_s) > _NOTABLE_S:
            words = f"{abs(skew_s):,.0f} s {'ahead of' if skew_s > 0 else 'behind'}"
            what = f"this computer's clock is {words} that of {name} ({url})"
            yield (wrong if abs(skew_s) > _WRONG_S else warning)("clock", what, _MEND)
        else:
            yield ok("clock", f"as {name}'s, within {_NOTABLE_S:g} s")
    if not compared:
        yield ok("clock", "no server that says what time it is")


def _servers(site: Site) -> dict[str, str]:
    """Name -> address of those that are in use."""
    found = {}
    if url := prefect_url(site.prefect):
        found["Prefect"] = f"{url}/health"
    if site.mlflow_uri.startswith(("http://", "https://")):
        found["MLflow"] = f"{site.mlflow_uri.rstrip('/')}/health"
    if any(place and place.startswith(S3_SCHEME) for place in (site.data, site.runs, site.bundles)):
        region = os.environ.get("AWS_DEFAULT_REGION") or os.environ.get("AWS_REGION") or "us-east-1"
        named = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        found["S3"] = named or f"https://s3.{region}.amazonaws.com"
    return found
