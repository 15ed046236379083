"""What the registry's aliases mean is there: a model that is to be served can be."""

from collections.abc import Iterator

from flows.doctor.finding import Asked, Finding, ok, wrong
from flows.doctor.mlflow_server import stands


def registry(asked: Asked) -> Iterator[Finding]:
    """Where MLflow does not answer, its own check says so."""
    site = asked.site
    if not site.mlflow and not (site.home / "mlflow.db").exists():
        yield ok("registry", "no model is registered yet")
        return
    if not stands(site.mlflow_uri):
        return
    from diffusion.adapters.mlflow_missing import missing  # it loads MLflow and torch, which takes seconds
    from diffusion.store.bundle_spec import bundle_path

    aliases = list(missing(site.tracking("doctor"), site.store))
    for alias in aliases:
        if alias.why is None:
            continue
        what = f"{alias.name}@{alias.alias} is version {alias.version}, and {alias.why}"
        back = f"copy {bundle_path(site.store, alias.digest)} back from where it was registered" if alias.digest else ""
        another = f"`diffusion rollback {alias.name} --to VERSION` chooses another"
        yield wrong("registry", what, f"{back}; or {another}" if back else another)
    if all(alias.why is None for alias in aliases):
        yield ok("registry", f"{len(aliases)} aliases of models, and their bundles are there")
