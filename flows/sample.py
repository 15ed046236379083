"""sample: pictures from a bundle, in this process, without Ray."""

import time
from pathlib import Path
from urllib.parse import quote

from diffusion.data.images import encode_png, grid
from diffusion.serving.receipt import receipt_of, stamp
from flows.console import progress, say
from flows.pictures import open_model, parsed, settled
from flows.site import Site


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
    asked = parsed(**options)  # before the model is loaded, which takes a while
    model = open_model(site, name, which, bundle)
    spec = model.bundle.spec
    rows = [asked.model_copy(update={"label": label}) for label in labels or spec.classes]
    resolved = [settled(request, model) for request in rows]
    with progress("sample", "evaluations") as update:
        drawn = model.engine.generate(rows, update)
    out = (out or site.home / "samples" / f"{model.name}-{time.strftime('%Y%m%d-%H%M%S')}").absolute()
    out.mkdir(parents=True, exist_ok=True)
    for request, pictures in zip(resolved, drawn, strict=True):
        for i, picture in enumerate(pictures):
            made_by = {"bundle_digest": model.bundle.digest, "model": model.name, "version": model.version}
            receipt = receipt_of(picture, i, request, spec, **made_by)
            (out / f"{_file_name(request.label)}-{request.seed}-{i:03d}.png").write_bytes(stamp(picture, receipt))
    names = [request.label or "" for request in resolved]
    (out / "grid.png").write_bytes(encode_png(grid([p for row in drawn for p in row], asked.n, names)))
    say(f"  seed       {asked.seed}")
    return out
