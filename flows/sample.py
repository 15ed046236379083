"""sample: pictures from a bundle, in this process, without Ray."""

import secrets
import time
from itertools import product
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
_GRID_NAME = 40  # characters beside a row of the grid


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
    prompts: list[str],
    out: Path | None,
    options: dict[str, object],
) -> Path:
    """Draw `options["n"]` pictures of each label with each prompt into `out`, and a grid with a row for each pair.

    With no label given: of each prompt alone; with neither, of each class of the model.  Returns the folder.

    options: fields of a GenerateRequest, None for the model's own.  Raises ValueError naming what is allowed.
    """
    seed = {"seed": secrets.randbelow(2**32) if options["seed"] is None else options["seed"]}
    # before the model is loaded, which takes a while
    asked = parse(GenerateRequest, options | seed)
    prompts = [parse(GenerateRequest, {"prompt": prompt}).prompt for prompt in prompts]
    if bundle is None:
        model = find_model(site.tracking(name), name, which, site.store)
        folder, digest, version = model.uri, model.digest, model.version
    else:
        folder, digest, name, version = str(bundle), None, bundle.name, ""
    with waiting("loading the model and proving that a picture does not depend on its batch"):
        loaded = load_bundle(folder, "cuda" if site.use_gpu else "cpu", digest=digest)
        pairs = product(labels or ([None] if prompts else loaded.spec.classes), prompts or [None])
        rows = [asked.model_copy(update={"label": label, "prompt": prompt}) for label, prompt in pairs]
        resolved = [resolve(request, loaded.spec) for request in rows]
        engine = Engine(loaded, slots=_SLOTS)
    with progress("sample", "evaluations") as update:
        drawn = engine.generate(rows, update)
    out = (out or site.home / "samples" / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}").absolute()
    out.mkdir(parents=True, exist_ok=True)
    for row, (request, pictures) in enumerate(zip(resolved, drawn, strict=True)):
        about = _file_name(request.label)
        if request.prompt is not None:
            about = f"{row:02d}-{about}-{_file_name(request.prompt)[:60]}"  # numbered: prompts may begin alike
        for i, picture in enumerate(pictures):
            receipt = receipt_of(
                picture, i, request, loaded.spec, bundle_digest=loaded.digest, model=name, version=version
            )
            (out / f"{about}-{request.seed}-{i:03d}.png").write_bytes(stamp(picture, receipt))
    names = [" ".join(filter(None, (request.label, request.prompt)))[:_GRID_NAME] for request in resolved]
    (out / "grid.png").write_bytes(encode_png(grid([p for row in drawn for p in row], asked.n, names)))
    say(f"  model      {name} {version and 'version ' + version}  {loaded.digest[:16]}\n  seed       {asked.seed}")
    return out
