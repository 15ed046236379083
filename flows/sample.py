"""sample: pictures from a bundle, in this process, without Ray."""

import secrets
import time
from pathlib import Path
from urllib.parse import quote

from diffusion.adapters.mlflow_registry import resolve as find_model
from diffusion.data.images import encode_png, grid
from diffusion.serving.engine import Engine
from diffusion.serving.receipt import receipt_of, stamp
from diffusion.serving.request import GenerateRequest, parse, resolve
from diffusion.store.bundle import load_bundle
from flows.console import progress, say, waiting
from flows.site import Site

_SLOTS = 16


def _file_name(label: str | None) -> str:
    """A class name as part of a file name.  It came with somebody's data, so nothing in it may lead to another folder."""
    return quote(label or "none", safe=" ").replace(".", "%2E")[:150]


def draw(
    site: Site,
    name: str,
    which: str,
    *,
    bundle: Path | None,
    labels: list[str],
    out: Path | None,
    options: dict[str, object],
) -> Path:
    """Draw `options["n"]` pictures of each label (none given: of each class of the model) into `out`, and a grid with a
    row for each label.  Returns the folder.

    options: fields of a GenerateRequest, None for the model's own.  Raises ValueError naming what is allowed.
    """
    seed = {"seed": secrets.randbelow(2**32) if options["seed"] is None else options["seed"]}
    asked = parse(GenerateRequest, options | seed)  # before the model is loaded, which takes a while
    if bundle is None:
        model = find_model(site.tracking(name), name, which, site.store)
        folder, digest, version = model.uri, model.digest, model.version
    else:
        folder, digest, name, version = str(bundle), None, bundle.name, ""
    with waiting("loading the model and proving that a picture does not depend on its batch"):
        loaded = load_bundle(folder, "cuda" if site.use_gpu else "cpu", digest=digest)
        rows = [asked.model_copy(update={"label": label}) for label in labels or loaded.spec.classes]
        resolved = [resolve(request, loaded.spec) for request in rows]
        engine = Engine(loaded, slots=_SLOTS)
    with progress("sample", "evaluations") as update:
        drawn = engine.generate(rows, update)
    out = (out or site.home / "samples" / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}").absolute()
    out.mkdir(parents=True, exist_ok=True)
    for request, pictures in zip(resolved, drawn, strict=True):
        for i, picture in enumerate(pictures):
            receipt = receipt_of(
                picture, i, request, loaded.spec, bundle_digest=loaded.digest, model=name, version=version
            )
            (out / f"{_file_name(request.label)}-{request.seed}-{i:03d}.png").write_bytes(stamp(picture, receipt))
    names = [request.label or "" for request in resolved]
    (out / "grid.png").write_bytes(encode_png(grid([p for row in drawn for p in row], asked.n, names)))
    say(f"  model      {name} {version and 'version ' + version}  {loaded.digest[:16]}\n  seed       {asked.seed}")
    return out
