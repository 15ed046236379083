"""replay: a picture drawn again from its receipt, and compared byte for byte."""

from pathlib import Path

import torch

from diffusion.lineage.replay import Outcome, outcome, redraw, remake, surroundings
from diffusion.serving.engine import Engine
from diffusion.serving.receipt import ReworkReceipt, format_of, stamp
from diffusion.store.bundle import load_bundle
from diffusion.store.publish import sha256_file
from flows.by_digest import bundle_of, read_picture
from flows.console import say, ticked, waiting, warn
from flows.pictures import read
from flows.preflight import check_folder
from flows.site import Site

_SLOTS = 16  # as `sample` and `restore`


def replay(
    site: Site,
    picture: Path,
    *,
    out: Path | None = None,
    tolerance: int = 0,
    given: Path | None = None,
    mask: Path | None = None,
) -> bool:
    """Draw the picture again, and say whether that gives the same.  out: file for what is drawn.

    tolerance: largest difference of a value, of 255, that counts as the same on another device or torch.  given, mask: the
    files that a picture of `restore` or `edit` was made of.  Returns whether it is the same, or within that.  Raises
    ValueError.
    """
    if not 0 <= tolerance <= 255:
        raise ValueError(f"--tolerance {tolerance}: give 0 to 255, the difference of two values of a pixel")
    if out is not None and out.exists():
        raise ValueError(f"--out {out}: there is such a file already, and it stays as it is: give another name")
    if out is not None:
        check_folder(out.absolute().parent, "`--out FILE`")
    data, found = read_picture(picture)
    receipt = found.receipt
    rework = receipt if isinstance(receipt, ReworkReceipt) else None
    for option, path, sha256 in (
        ("--given", given, rework and rework.given_sha256),
        ("--mask", mask, rework and rework.mask_sha256),
    ):
        _check_file(option, path, sha256)
    folder = bundle_of(site, receipt.bundle_digest)
    device = torch.device("cuda" if site.use_gpu else "cpu")
    here = surroundings(device)
    say(f"  bundle     {receipt.bundle_digest}")
    say(f"  request    seed {receipt.seed}, picture {receipt.image}, {receipt.sampler}, {receipt.steps} steps")
    say(f"  here       {here.device}, torch {here.torch}")
    with waiting("loading the model and proving that a picture does not depend on its batch"):
        engine = Engine(load_bundle(folder, device, digest=receipt.bundle_digest), slots=_SLOTS)
    with waiting("drawing it again"):
        if rework is None:
            drawn = redraw(receipt, engine)
        else:
            drawn = remake(rework, engine, read(given), mask and read(mask, "mask"))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(stamp(drawn, receipt, format_of(data)))
        say(f"  written    {out}")
    return _told(outcome(data, found, drawn, here), tolerance)


def _check_file(option: str, path: Path | None, sha256: str | None) -> None:
    """A file that the picture was made of, by its bytes."""
    if sha256 is None and path is not None:
        raise ValueError(f"{option} {path}: the picture was made of no such file; leave it out")
    if sha256 is None:
        return
    what = f"the file whose sha256 is {sha256}"
    if path is None:
        raise ValueError(f"{option} is missing: this picture was made of another; give {option} and {what}")
    if not path.is_file():
        raise ValueError(f"{option} {path} is no file: give {what}")
    if (actual := sha256_file(path)) != sha256:
        raise ValueError(f"{option} {path} has sha256 {actual}, and the picture was made of another: give {what}")


def _told(what: Outcome, tolerance: int) -> bool:
    if what.same_pixels:
        ticked(what.words())
    elif not what.original and what.largest <= tolerance:
        ticked(f"{what.words()}: within --tolerance {tolerance}")
    else:
        warn(what.words())
        return False
    return True
