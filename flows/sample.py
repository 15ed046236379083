"""sample: pictures from a bundle, in this process, without Ray."""

from hashlib import sha256
from itertools import product
from pathlib import Path
from typing import get_args
from urllib.parse import quote

from diffusion.data.images import encode_png, grid
from diffusion.serving.receipt import Format, receipt_of, stamp
from diffusion.serving.request import GenerateRequest, resolve
from diffusion.store.bundle_spec import BundleSpec
from flows.console import progress, say
from flows.pictures import folder, open_model, parsed, settled
from flows.site import Site

_GRID_NAME = 40  # characters beside a row of the grid


def _file_name(label: str | None) -> str:
    """A class name as part of a file name.  It came with somebody's data, so nothing in it may lead to another folder."""
    name = quote(label or "none", safe=" ").replace(".", "%2E")
    return name if len(name) <= 150 else f"{name[:140]}-{sha256(name.encode()).hexdigest()[:9]}"


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
    format: str = "png",
) -> Path:
    """Draw `options["n"]` pictures of each label with each prompt into `out`, and a grid with a row for each pair.

    With no label given: of each prompt alone; with neither, of each class of the model.  Returns the folder.

    options: fields of a GenerateRequest, None for the model's own; format: of the files.  Raises ValueError naming what is
    allowed.
    """
    if format not in get_args(Format):
        raise ValueError(f"--format {format}: give {' or '.join(get_args(Format))}")
    asked = parsed(**options)  # before the model is loaded, which takes a while
    out = folder(site, out, "samples", bundle.name if bundle else name)
    prompts = [parsed(prompt=prompt).prompt for prompt in prompts]

    def wanted(spec: BundleSpec) -> list[GenerateRequest]:
        pairs = product(labels or ([None] if prompts else spec.classes), prompts or [None])
        return [asked.model_copy(update={"label": label, "prompt": prompt}) for label, prompt in dict.fromkeys(pairs)]

    model = open_model(site, name, which, bundle, lambda spec: [resolve(request, spec) for request in wanted(spec)])
    spec = model.bundle.spec
    rows = wanted(spec)
    resolved = [settled(request, model) for request in rows]
    with progress("sample", "evaluations") as update:
        drawn = model.engine.generate(rows, update)
    out.mkdir(parents=True, exist_ok=True)
    for row, (request, pictures) in enumerate(zip(resolved, drawn, strict=True)):
        about = _file_name(request.label)
        if request.prompt is not None:
            about = f"{row:02d}-{about}-{_file_name(request.prompt)[:60]}"  # numbered: prompts may begin alike
        for i, picture in enumerate(pictures):
            made_by = {"bundle_digest": model.bundle.digest, "model": model.name, "version": model.version}
            made_by |= {"device": model.device}
            receipt = receipt_of(picture, i, request, spec, **made_by)
            (out / f"{about}-{request.seed}-{i:03d}.{format}").write_bytes(stamp(picture, receipt, format))
    names = [" ".join(filter(None, (request.label, request.prompt)))[:_GRID_NAME] for request in resolved]
    (out / "grid.png").write_bytes(encode_png(grid([p for row in drawn for p in row], asked.n, names)))
    say(f"  seed       {asked.seed}")
    return out
