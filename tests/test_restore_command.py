"""`diffusion restore` and `diffusion edit` on a published model: files, measurements and mistakes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from diffusion.data.images import decode_png, png_text, to_model, to_uint8
from diffusion.edit import by_condition, levels_of
from diffusion.guidance import classifier_free, conditioned
from diffusion.sampler import heun, run
from diffusion.schedule import karras_sigmas
from diffusion.serving.job import condition
from diffusion.serving.receipt import read_receipt
from diffusion.serving.restoring import TASKS
from diffusion.spacing import DETAIL
from flows.cli import app
from flows.site import Site
from tests.random_bundle import (
    CLASSES,
    RESOLUTION,
    published_model,
    reading_bundle,
    restoring_bundle,
    shaped_bundle,
)
from tests.words import install

SIZE = 2 * RESOLUTION
LEARNED = ("super-resolution", "inpainting")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture, a mask of its size whose right half is white, a model that draws, one that reads prompts, and one
    trained for LEARNED."""
    folder = tmp_path_factory.mktemp("pictures")
    values = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    Image.fromarray(values).resize((RESOLUTION, RESOLUTION)).save(folder / "picture.png")
    Image.fromarray(values[:, :20]).save(folder / "narrow.png")
    mask = np.zeros((RESOLUTION, RESOLUTION), dtype=np.uint8)
    mask[:, RESOLUTION // 2 :] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    Image.fromarray(np.zeros_like(mask)).save(folder / "dark.png")
    Image.fromarray(values[:2, :2]).save(folder / "tiny.png")
    (folder / "text.png").write_text("no picture")
    published_model(folder / "store")
    published_model(folder / "reading", bundle=reading_bundle("fp32"))
    published_model(folder / "restorer", bundle=restoring_bundle(LEARNED))
    published_model(folder / "shaped", bundle=shaped_bundle())
    return folder


@pytest.fixture
def diffusion(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folder: Path):
    """Runs a command here, files named by their name in the folder; its ValueError is the answer."""
    monkeypatch.setattr("flows.cli_pictures.guarded", lambda work, debug, **given: work(Site(home=tmp_path, gpu=False)))
    install(monkeypatch)

    def run(*arguments: str, out: str = "out", store: str = "store") -> tuple[Path, str]:
        (bundle,) = (folder / store / "bundles").iterdir()
        paths = [str(folder / part) if part.endswith(".png") else part for part in arguments]
        given = [*paths, "--bundle", str(bundle), "--steps", "3", "--out", str(tmp_path / out), "--seed", "5"]
        done = CliRunner().invoke(app, given)
        if done.exception is not None:
            raise done.exception
        return tmp_path / out, done.stdout

    return run


@pytest.mark.parametrize("command", ["restore", "edit"])
def test_the_commands_have_help(command: str) -> None:
    done = CliRunner().invoke(app, [command, "--help"])
    assert done.exit_code == 0
    assert all(option in done.stdout for option in ("PICTURE", "--label", "--bundle", "--mask", "--seed", "--home"))


def test_what_the_mask_leaves_dark_stays_to_the_last_bit_and_each_result_is_its_own(diffusion, folder: Path) -> None:
    given = ("restore", "picture.png", "--task", "inpainting", "--mask", "mask.png", "--label", CLASSES[0])
    two, told = diffusion(*given, "--n", "2", "--guidance", "2")
    one, _ = diffusion(*given, "--n", "1", "--guidance", "2", out="one")
    picture = np.array(Image.open(folder / "picture.png"))
    half = RESOLUTION // 2
    first, second = (decode_png((two / f"5-00{i}.png").read_bytes()) for i in (0, 1))
    assert np.array_equal(first[:, :half], picture[:, :half])
    assert np.array_equal(second[:, :half], picture[:, :half])
    assert (first[:, half:] != second[:, half:]).any()
    assert np.array_equal(first, decode_png((one / "5-000.png").read_bytes()))
    assert "in the PNG, rounded to 8 bits, 0 " in told
    assert "18 of 18 evaluations" in told  # 3 steps, gone 3 times, of 2 pictures
    facts = json.loads(png_text((two / "5-001.png").read_bytes())["diffusion-restore"])
    assert (facts["task"], facts["label"], facts["seed"], facts["image"]) == ("inpainting", CLASSES[0], 5, 1)
    assert decode_png((two / "strip.png").read_bytes()).shape[1] > 3 * RESOLUTION


@pytest.mark.parametrize(
    "task", [("super-resolution", "--factor", "4"), ("colorization",), ("colorization", "--factor", "2")]
)
def test_the_measurement_is_satisfied_and_said(task: tuple[str, ...], diffusion) -> None:
    _, told = diffusion("restore", "narrow.png", "--task", *task)
    assert f"the centred square of the picture, 20 x {SIZE}, to {RESOLUTION} x {RESOLUTION}" in told
    assert float(told.split("sqrt(dim y)")[1].split(";")[0]) < 1e-5


@pytest.mark.parametrize(
    "command",
    [
        ("edit", "--label", "dog", "--strength", "0.5"),
        ("edit", "--label", "dog", "--from-label", "cat", "--coarse", "4"),
        ("restore", "--task", "super-resolution", "--factor", "4"),
        ("restore", "--task", "inpainting", "--mask", "narrow-mask.png"),
        ("restore", "--task", "colorization"),
    ],
)
def test_a_model_of_several_sizes_works_at_the_one_nearest_to_the_picture(command, diffusion, folder: Path) -> None:
    Image.new("L", (10, SIZE)).save(folder / "narrow-mask.png")
    with Image.open(folder / "narrow-mask.png") as mask:
        mask.paste(255, (0, 0, 10, 16))
        mask.save(folder / "narrow-mask.png")
    with Image.open(folder / "narrow.png") as picture:
        picture.crop((0, 0, 10, SIZE)).save(folder / "narrower.png")
    out, told = diffusion(command[0], "narrower.png", *command[1:], store="shaped")
    assert f"the centred 8:24 of the picture, 10 x {SIZE}, to 8 x 24" in told
    assert decode_png((out / "5-000.png").read_bytes()).shape == (24, 8, 3)


def test_sample_draws_at_the_size_that_is_asked(diffusion, monkeypatch) -> None:
    out, _ = diffusion("sample", "--label", "cat", "--n", "2", "--size", "24X8", store="shaped")
    picture = (out / "cat-5-001.png").read_bytes()
    assert (decode_png(picture).shape, read_receipt(picture).size) == ((8, 24, 3), "24x8")
    monkeypatch.setattr("flows.pictures.load_bundle", None)  # it is told before
    with pytest.raises(ValueError, match="size='32x8': the sizes of this model, width x height, are 8x24, 16x16, 24x8"):
        diffusion("sample", "--size", "32x8", store="shaped", out="none")


def test_a_model_goes_the_way_it_was_trained_for(diffusion, folder: Path) -> None:
    given = ("restore", "picture.png", "--task", "inpainting", "--mask", "mask.png")
    out, told = diffusion(*given, store="restorer")
    picture, result = np.array(Image.open(folder / "picture.png")), decode_png((out / "5-000.png").read_bytes())
    half = RESOLUTION // 2
    assert np.array_equal(result[:, :half], picture[:, :half])
    assert "learned inpainting" in told
    assert "5 of 5 evaluations" in told
    facts = json.loads(png_text((out / "5-000.png").read_bytes())["diffusion-restore"])
    assert (facts["way"], facts["sampler"], facts["steps"]) == ("trained", "heun", 3)
    assert "repeats" not in facts


@pytest.mark.parametrize(
    "given",
    [
        ("--task", "colorization"),  # not learned
        ("--task", "super-resolution", "--factor", "2", "--way", "zero-shot"),
        ("--task", "super-resolution", "--factor", "2", "--noise", "0.1"),
        ("--task", "super-resolution", "--factor", "2", "--repeats", "3"),
    ],
)
def test_what_is_not_learned_or_asked_otherwise_goes_zero_shot(given: tuple[str, ...], diffusion) -> None:
    out, told = diffusion("restore", "picture.png", *given, store="restorer")
    assert "zero-shot" in told
    assert "9 of 9 evaluations" in told
    facts = json.loads(png_text((out / "5-000.png").read_bytes())["diffusion-restore"])
    assert (facts["way"], facts["repeats"]) == ("zero-shot", 3)


def test_an_edit_by_inversion_keeps_what_lies_outside_the_mask(diffusion, folder: Path) -> None:
    out, told = diffusion("edit", "picture.png", "--label", "dog", "--from-label", "cat", "--mask", "mask.png")
    picture, edited = np.array(Image.open(folder / "picture.png")), decode_png((out / "5-000.png").read_bytes())
    half = RESOLUTION // 2
    assert np.array_equal(edited[:, :half], picture[:, :half])
    assert (edited[:, half:] != picture[:, half:]).any()
    assert "changed " in told


def test_an_edit_by_prompt_is_the_inversion_under_one_and_the_way_back_under_the_other(diffusion, folder) -> None:
    """An independent slow version, without engine or ladder."""
    given = ("--from-prompt", "a red flag", "--prompt", "a blue flag", "--label", "dog", "--guidance", "3")
    out, _ = diffusion("edit", "picture.png", *given, "--strength", "0.7", store="reading")
    png = (out / "5-000.png").read_bytes()
    bundle, cpu = reading_bundle("fp32"), torch.device("cpu")
    own, wanted = condition(bundle, 3, "a red flag", 1, cpu), condition(bundle, 1, "a blue flag", 1, cpu)
    reference = to_model(torch.from_numpy(np.array(Image.open(folder / "picture.png")))[None])
    sigmas = levels_of(karras_sigmas(3, sigma_min=DETAIL, sigma_max=80.0), 0.7)
    expected = by_condition(
        heun,
        reference,
        sigmas,
        before=lambda c: conditioned(c, own),
        after=lambda c: classifier_free(c, wanted, condition(bundle, 3, None, 1, cpu), 3.0),
    )
    off = decode_png(png).astype(int) - to_uint8(run(expected, bundle.denoiser))[0].numpy()
    assert np.abs(off).max() <= 1
    facts = json.loads(png_text(png)["diffusion-edit"])
    assert [facts.get(name) for name in ("from_label", "from_prompt", "label", "prompt")] == [
        None,
        "a red flag",
        "dog",
        "a blue flag",
    ]


@pytest.mark.parametrize("own", [(), ("--from-prompt", "a red flag"), ("--from-label", "cat", "--from-prompt", "red")])
def test_an_edit_by_prompt_keeps_what_lies_outside_the_mask(own: tuple[str, ...], diffusion, folder: Path) -> None:
    given = ("edit", "picture.png", *own, "--mask", "mask.png", "--prompt")
    blue, green = (
        decode_png((diffusion(*given, words, out=words, store="reading")[0] / "5-000.png").read_bytes())
        for words in ("a blue flag", "green")
    )
    picture, half = np.array(Image.open(folder / "picture.png")), RESOLUTION // 2
    assert np.array_equal(blue[:, :half], picture[:, :half])
    assert np.array_equal(green[:, :half], picture[:, :half])
    assert (blue[:, half:] != green[:, half:]).any()


def test_an_edit_by_noise_gives_several_results(diffusion) -> None:
    out, _ = diffusion("edit", "picture.png", "--label", "dog", "--strength", "1", "--coarse", "4", "--n", "2")
    assert sorted(path.name for path in out.iterdir()) == ["5-000.png", "5-001.png", "strip.png"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("restore", "picture.png", "--task", "upscaling"), f"task='upscaling'.*{', '.join(TASKS)}"),
        (("restore", "picture.png", "--task", "super-resolution"), "factor is missing.*takes one, factor 2 or 4 or 8"),
        (("restore", "picture.png", "--task", "super-resolution", "--factor", "3"), "factor=3"),
        (("restore", "picture.png", "--task", "colorization", "--factor", "3"), "factor=3: give factor 2 or 4 or 8"),
        (("restore", "picture.png", "--task", "inpainting", "--factor", "2"), "takes none"),
        (("restore", "picture.png", "--task", "inpainting"), "mask is missing"),
        (("restore", "picture.png", "--task", "colorization", "--mask", "mask.png"), "takes none"),
        (("restore", "picture.png", "--task", "colorization", "--noise", "-1"), "noise=-1:.*0 to 2"),
        (("restore", "picture.png", "--task", "colorization", "--repeats", "0"), "repeats=0.*1 to 100"),
        (("restore", "picture.png", "--task", "colorization", "--n", "0"), "n=0.*1 or more"),
        (
            ("restore", "picture.png", "--task", "colorization", "--way", "best"),
            "way='best'.*trained, zero-shot",
        ),
        (
            ("restore", "picture.png", "--task", "colorization", "--way", "trained", "--noise", "1"),
            "Give way=zero-shot",
        ),
        (
            ("restore", "picture.png", "--task", "colorization", "--way", "trained", "--repeats", "2"),
            "that way is gone",
        ),
        (
            ("restore", "picture.png", "--task", "colorization", "--way", "trained"),
            r"trained for no restoration.*--preset restorer`, and ask that",
        ),
        (("restore", "picture.png", "--task", "inpainting", "--mask", "dark.png"), "the mask is dark everywhere"),
        (
            ("restore", "tiny.png", "--task", "super-resolution", "--factor", "2"),
            r"the model draws 16 x 16: give factor",
        ),
        (("restore", "none.png", "--task", "colorization"), "none.png is no file"),
        (("restore", "text.png", "--task", "colorization"), "picture cannot be read as a picture"),
        (
            ("edit", "picture.png", "--label", "dog", "--from-label", "cat", "--n", "2"),
            "n=2 with from_label: .* one result",
        ),
        (
            ("edit", "picture.png", "--prompt", "a", "--from-prompt", "b", "--n", "2"),
            "n=2 with from_prompt: .* one result",
        ),
        (("edit", "picture.png", "--prompt", " "), "a prompt has words"),
        (("edit", "picture.png", "--prompt", "a", "--from-prompt", ""), "from_prompt=''"),
        (("edit", "picture.png", "--prompt", "a" * 301), "at most 300 characters"),
        (("edit", "picture.png", "--label", "bird"), f"its classes are {', '.join(CLASSES)}"),
        (("edit", "picture.png", "--label", "dog", "--from-label", "bird"), "from_label, .*its classes are"),
        (("restore", "picture.png", "--task", "colorization", "--prompt", "a dog"), "this model reads no prompts"),
        (("sample", "--label", "cat", "--label", "bird"), "label='bird' is not a class"),
    ],
)
def test_mistakes_are_named_before_the_model_is_loaded(arguments, says: str, diffusion, monkeypatch) -> None:
    monkeypatch.setattr("flows.pictures.load_bundle", None)
    with pytest.raises(ValueError, match=says):
        diffusion(*arguments)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--label", "bird"), f"its classes are {', '.join(CLASSES)}"),
        (("--label", "dog", "--from-label", "bird"), "from_label, .*its classes are"),
        (("--prompt", "a dog"), "prompt='a dog': this model reads no prompts.*give a label"),
        (("--label", "dog", "--from-prompt", "a cat"), "from_prompt: prompt='a cat': this model reads no prompts"),
        (("--label", "dog", "--strength", "0"), "strength=0:.*above 0"),
        (("--label", "dog", "--coarse", "5"), "a divisor of the model's 16"),
        (("--label", "dog", "--from-label", "cat", "--sampler", "ddpm"), "sampler=ddpm adds noise.*give one of heun"),
        (("--label", "dog", "--mask", "dark.png"), "the mask is dark everywhere"),
        (("--label", "dog", "--mask", "narrow.png"), "give a mask of the picture's size"),
        (("--guidance", "3"), "no label is given"),
    ],
)
def test_mistakes_that_its_facts_show_are_named_before_it_is_loaded(arguments, says, diffusion, monkeypatch) -> None:
    monkeypatch.setattr("flows.pictures.load_bundle", None)
    with pytest.raises(ValueError, match=says):
        diffusion("edit", "picture.png", *arguments)


def test_a_way_that_was_not_learned_is_refused_with_what_to_do(diffusion, monkeypatch) -> None:
    monkeypatch.setattr("flows.pictures.load_bundle", None)
    given = ("restore", "picture.png", "--task", "colorization", "--way", "trained")
    with pytest.raises(ValueError, match=r"trained for super-resolution, inpainting, not for colorization\. Leave way"):
        diffusion(*given, store="restorer")


def test_colouring_and_enlarging_at_once_is_no_trained_way(diffusion) -> None:
    small = ("restore", "picture.png", "--task", "colorization", "--factor", "2")
    assert "zero-shot" in diffusion(*small, store="restorer")[1]
    with pytest.raises(ValueError, match="not for colorization of a small picture"):
        diffusion(*small, "--way", "trained", store="restorer", out="never")


def test_what_a_picture_shows_can_be_said_in_words(diffusion) -> None:
    words = ("restore", "picture.png", "--task", "colorization", "--prompt")
    a, b = (diffusion(*words, said, store="reading", out=said)[0] for said in ("dog", "cat"))
    assert (a / "5-000.png").read_bytes() != (b / "5-000.png").read_bytes()
    assert json.loads(png_text((a / "5-000.png").read_bytes())["diffusion-restore"])["prompt"] == "dog"
    with pytest.raises(ValueError, match="reads no prompts"):
        diffusion(*words, "dog")


def test_no_file_is_overwritten(diffusion, folder: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine" / "5-000.png"
    mine.parent.mkdir()
    mine.write_bytes((folder / "picture.png").read_bytes())
    for command in (("restore", "--task", "colorization"), ("edit", "--label", "dog")):
        with pytest.raises(ValueError, match="mine has files in it, and none is overwritten"):
            diffusion(command[0], "picture.png", *command[1:], out="mine")
    assert mine.read_bytes() == (folder / "picture.png").read_bytes()
