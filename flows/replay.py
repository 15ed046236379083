"""replay: a picture drawn again from its receipt, and compared byte for byte."""

from pathlib import Path

from diffusion.lineage.replay import Outcome, outcome, redraw, surroundings
from diffusion.serving.engine import Engine
from diffusion.serving.receipt import stamp
from diffusion.store.bundle import load_bundle
from flows.by_digest import bundle_of, read_picture
from flows.console import say, ticked, waiting, warn
from flows.site import Site

_SLOTS = 16  # as `sample` and `restore`


def replay(site: Site, picture: Path, *, out: Path | None = None, tolerance: int = 0) -> bool:
    """Draw the picture again, and say whether that gives the same.  out: file for what is drawn.

    tolerance: largest difference of a value, of 255, that counts as the same on another device or torch.  Returns whether
    it is the same, or within that.  Raises ValueError.
    """
    if not 0 <= tolerance <= 255:
        raise ValueError(f"--tolerance {tolerance}: give 0 to 255, the difference of two values of a pixel")
    if out is not None and out.exists():
        raise ValueError(f"--out {out}: there is such a file already, and it stays as it is: give another name")
    data, found = read_picture(picture)
    receipt = found.receipt
    folder = bundle_of(site, receipt.bundle_digest)
    with waiting("loading the model and proving that a picture does not depend on its batch"):
        bundle = load_bundle(folder, "cuda" if site.use_gpu else "cpu", digest=receipt.bundle_digest)
        engine = Engine(bundle, slots=_SLOTS)
    here = surroundings(engine.device)
    say(
        f"  model      {receipt.model} {receipt.version and 'version ' + receipt.version}  {receipt.bundle_digest[:16]}"
    )
    say(f"  request    seed {receipt.seed}, picture {receipt.image}, {receipt.sampler}, {receipt.steps} steps")
    say(f"  here       {here.device}, torch {here.torch}")
    with waiting("drawing it again"):
        drawn = redraw(receipt, engine)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(stamp(drawn, receipt))
        say(f"  written    {out}")
    return _told(outcome(data, found, drawn, here), tolerance)


def _told(what: Outcome, tolerance: int) -> bool:
    if what.same_pixels:
        ticked(what.words())
    elif not what.original and what.largest <= tolerance:
        ticked(f"{what.words()}: within --tolerance {tolerance}")
    else:
        warn(what.words())
        return False
    return True
