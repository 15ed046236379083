"""edit: a picture changed towards a class or a prompt, by noising it or by carrying it to noise under its own and back."""

from pathlib import Path

from diffusion.serving.editing import EditRequest, check_edit
from diffusion.serving.editing import edit as editing
from flows.console import say
from flows.pictures import folder, open_model, parsed, read, reworked
from flows.site import Site


def edit(
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
    """Edit the picture towards `options`' label and prompt into `out`, beside a strip before | after.  Returns the folder.

    mask: white where it may change.  options: fields of an EditRequest, None for the model's own.  Raises ValueError.
    """
    asked = parsed(EditRequest, **options)
    target = folder(site, out, "edited", picture.stem)
    given, hole = read(picture), mask and read(mask, "mask")
    model = open_model(site, name, which, bundle, lambda spec: check_edit(asked, given, hole, spec))
    rework = editing(asked, given, hole, model.bundle, model.device)
    written, _ = reworked("edit", rework, model, target)
    change = (written - rework.before).square().mean().sqrt()
    say(f"  changed    by {float(change):.2g} root mean square (white - black is 2)")
    return target
