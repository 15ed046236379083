"""Pictures of `diffusion restore` and `diffusion edit`: their receipts, and the same bytes again from what was given."""

from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffusion.serving.receipt import ReworkReceipt, opened, stamp
from flows.site import Site
from tests.commands import command, on
from tests.random_bundle import CLASSES, RESOLUTION, published_model, restoring_bundle

TRAINED = ("super-resolution", "inpainting")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture, a mask whose right half is white, and a home with a model that draws and one that restores."""
    folder = tmp_path_factory.mktemp("rework")
    values = np.random.default_rng(0).integers(0, 256, (RESOLUTION, RESOLUTION, 3), dtype=np.uint8)
    Image.fromarray(values).save(folder / "picture.png")
    mask = np.zeros((RESOLUTION, RESOLUTION), dtype=np.uint8)
    mask[:, RESOLUTION // 2 :] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    (folder / "draws").write_text(published_model(folder / "store").uri)
    (folder / "restores").write_text(published_model(folder / "store", seed=1, bundle=restoring_bundle(TRAINED)).uri)
    return folder


@pytest.fixture
def diffusion(monkeypatch: pytest.MonkeyPatch, folder: Path):
    """Runs a command here; its ValueError is the answer.  Returns exit code and what it said."""
    on(Site(home=folder, gpu=False), monkeypatch, "cli_pictures")
    on(Site(home=folder, gpu=False), monkeypatch, "cli_lineage", guards=("reading",))
    return command


MADE = {
    "zero-shot": ["restore", "--task", "super-resolution", "--factor", "2", "--n", "2", "--noise", "0.1"],
    "trained": ["restore", "--task", "inpainting", "--n", "2", "--label", CLASSES[1], "--guidance", "2"],
    "noised": ["edit", "--label", CLASSES[0], "--n", "2", "--strength", "0.7", "--coarse", "4", "--sampler", "ddim"],
    "inverted": ["edit", "--from-label", CLASSES[0], "--label", CLASSES[1], "--strength", "0.5"],
}


def make(kind: str, folder: Path, out: Path, diffusion) -> tuple[Path, list[object]]:
    """The last picture of a kind, and the files it was made of, as options."""
    command, *options = MADE[kind]
    bundle = (folder / ("restores" if kind == "trained" else "draws")).read_text()
    given = ["--given", folder / "picture.png"]
    if kind in ("trained", "inverted"):
        options += ["--mask", folder / "mask.png"]
        given += ["--mask", folder / "mask.png"]
    diffusion(command, folder / "picture.png", *options, "--bundle", bundle, "--steps", 3, "--seed", 5, "--out", out)
    return sorted(out.glob("5-*.png"))[-1], given


@pytest.mark.parametrize("kind", MADE)
def test_what_was_made_of_a_picture_is_made_again_of_it(kind: str, folder: Path, tmp_path: Path, diffusion) -> None:
    picture, given = make(kind, folder, tmp_path / "out", diffusion)
    receipt = opened(picture.read_bytes()).receipt
    assert isinstance(receipt, ReworkReceipt)
    assert receipt.given_sha256 == sha256((folder / "picture.png").read_bytes()).hexdigest()
    code, told = diffusion("replay", picture, *given, "--out", tmp_path / "again.png")
    assert (code, "the same bytes" in told) == (0, True), told
    assert (tmp_path / "again.png").read_bytes() == picture.read_bytes()


def test_other_files_than_it_was_made_of_are_refused(folder: Path, tmp_path: Path, diffusion) -> None:
    picture, given = make("trained", folder, tmp_path / "out", diffusion)
    wanted = sha256((folder / "picture.png").read_bytes()).hexdigest()
    with pytest.raises(ValueError, match=f"--given is missing: .* whose sha256 is {wanted}"):
        diffusion("replay", picture)
    with pytest.raises(ValueError, match="--mask is missing"):
        diffusion("replay", picture, *given[:2])
    with pytest.raises(ValueError, match="and the picture was made of another"):
        diffusion("replay", picture, "--given", folder / "mask.png", *given[2:])
    with pytest.raises(ValueError, match="is no file"):
        diffusion("replay", picture, "--given", folder / "none.png", *given[2:])
    other, own = make("noised", folder, tmp_path / "other", diffusion)
    with pytest.raises(ValueError, match="made of no such file"):
        diffusion("replay", other, *own, *given[2:])


def test_a_setting_that_was_changed_gives_another_picture(folder: Path, tmp_path: Path, diffusion) -> None:
    picture, given = make("noised", folder, tmp_path / "out", diffusion)
    found = opened(picture.read_bytes())
    for changed in ({"seed": 6}, {"image": 0}, {"strength": 0.4}, {"coarse": None}):
        path = tmp_path / "changed.png"
        path.write_bytes(stamp(found.picture, found.receipt.model_copy(update=changed)))
        code, told = diffusion("replay", path, *given)
        assert (code, "other pixels" in told) == (1, True), (changed, told)


def test_its_origin_is_traced(folder: Path, tmp_path: Path, diffusion) -> None:
    picture, _ = make("inverted", folder, tmp_path / "out", diffusion)
    receipt = opened(picture.read_bytes()).receipt
    code, told = diffusion("trace", picture)
    assert f"the file of sha256 {receipt.given_sha256}: edit of strength 0.5" in told
    assert f"bundle {receipt.bundle_digest}" in told
    assert f"dataset {receipt.dataset_digest}" in told
    assert code == 1  # a model of random weights was not trained on anything
