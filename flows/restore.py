"""restore: a picture from a part of it - small, masked or grey - with a model trained for that, or for none of these."""

from pathlib import Path

from diffusion.restore import residual
from diffusion.serving.given import size_for
from diffusion.serving.restoring import RestoreRequest, check_restoration, measured, restoration
from flows.console import say
from flows.pictures import folder, open_model, parsed, read, reworked
from flows.site import Site


def restore(
    site: Site,
    name: str,
    which: str,
    picture: Path,
    *,
    bundle: Path | None = None,
    mask: Path | None = None,
    out: Path | None = None,
    options: dict[str, object],
) -> Path:
    """Restore the picture `options["n"]` times into `out`, beside a strip input | results.  Returns the folder.

    mask: inpainting's, white where something is missing.  options: fields of a RestoreRequest, None for the model's own.
    Raises ValueError.
    """
    asked = parsed(RestoreRequest, **options)
    target = folder(site, out, "restored", picture.stem)
    given, hole = read(picture), mask and read(mask, "mask")
    model = open_model(site, name, which, bundle, lambda spec: check_restoration(asked, given, hole, spec))
    rework = restoration(asked, given, hole, model.bundle, model.device)
    learned = f"trained, {model.name} learned {asked.task}"
    say(
        f"  way        {learned if rework.facts['way'] == 'trained' else 'zero-shot, by what a model that draws knows'}"
    )
    written, off = reworked("restore", rework, model, target)
    size = size_for(given.image, model.bundle.spec)
    found = measured(asked, given.image, hole and hole.image, size, model.device)
    rounded = float(residual(found.operator, written, found.y).max())
    say(
        f"  ||A x - y|| / sqrt(dim y)  {max(off):.2g}; in the PNG, rounded to 8 bits, {rounded:.2g} (white - black is 2)"
    )
    return target
