"""The page's work on a given picture, and the commands it shows, in a real Chromium against a real server."""

# ruff: noqa: F811 (fixtures of another file)

import hashlib
import io
import json
import os
import subprocess
from base64 import b64decode
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Page, expect

from diffusion.data.images import decode_png
from diffusion.serving.engine import Engine
from diffusion.serving.keys import Access, add
from tests.chromium import opened
from tests.integration.test_http import served
from tests.integration.test_page import browser, client, engine, page  # noqa: F401  (fixtures)
from tests.on_page import draw, more, receipt, shown
from tests.random_bundle import RESOLUTION, random_bundle, reading_bundle

HALF = RESOLUTION // 2
VALUES = np.random.default_rng(0).integers(0, 256, (RESOLUTION, RESOLUTION, 3), dtype=np.uint8)
NAME = 'it\'s; a "picture".png'
PHONE = {"viewport": {"width": 360, "height": 640}, "has_touch": True, "is_mobile": True}


def png(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG")
    return file.getvalue()


PICTURE = png(VALUES)
SMALL = png(VALUES[:4, :4])


def give(page: Page, task: str, data: bytes = PICTURE) -> None:
    page.locator(f"input[value={task}]").check(force=True)
    page.locator("#file").set_input_files({"name": NAME, "mimeType": "image/png", "buffer": data})
    expect(page.locator("#picked")).to_contain_text(NAME)


def paint(page: Page, x: float = 0.85, touch: bool = False) -> None:
    """A stroke from top to bottom, 0.3 of the picture wide, around `x` of its width."""
    page.locator("#brush").evaluate("brush => { brush.value = 30; }")
    page.locator("#mask").scroll_into_view_if_needed()
    box = page.locator("#mask").bounding_box()
    across = box["x"] + x * box["width"]
    if touch:
        for i in range(9):
            page.touchscreen.tap(across, box["y"] + (i + 0.5) / 9 * box["height"])
        return
    page.mouse.move(across, box["y"] + 1)
    page.mouse.down()
    page.mouse.move(across, box["y"] + box["height"] - 1, steps=4)
    page.mouse.up()


def saved(page: Page, link: str, folder: Path) -> Path:
    page.locator("#terminal").evaluate("part => { part.open = true; }")
    with page.expect_download() as download:
        page.locator(link).click()
    path = folder / download.value.suggested_filename
    download.value.save_as(path)
    return path


def commanded(page: Page, folder: Path, **environment: str) -> list[bytes]:
    """What the command that draws what is shown draws, in a shell."""
    page.locator("#run-curl").click()
    expect(page.locator("#copied")).to_have_text("Copied.")
    command = page.evaluate("() => navigator.clipboard.readText()")
    subprocess.run(["bash", "-ec", command], cwd=folder, check=True, timeout=60, env=os.environ | environment)
    if (folder / "drawn.png").exists():
        return [(folder / "drawn.png").read_bytes()]
    return [b64decode(item["b64_json"]) for item in json.loads((folder / "drawn.json").read_bytes())["data"]]


def test_what_is_painted_is_drawn_anew_and_the_rest_is_kept(page, tmp_path) -> None:
    give(page, "inpaint")
    page.locator("#go").click()
    expect(page.locator("#error")).to_have_text("Paint over what is to be drawn anew first.")
    paint(page)
    page.locator("#n").fill("2")
    pictures = draw(page)
    mask = saved(page, "#save-mask", tmp_path)
    white = np.asarray(Image.open(mask).convert("L")) == 255
    assert (Image.open(mask).mode, Image.open(mask).size) == ("RGBA", (RESOLUTION, RESOLUTION))
    assert white[:, -2].all()
    assert not white[:, :HALF].any()
    for data in pictures:
        assert np.array_equal(decode_png(data)[~white], VALUES[~white])
        assert (decode_png(data)[white] != VALUES[white]).mean() > 0.9
    found = receipt(pictures[0])
    assert found.mask_sha256 == hashlib.sha256(mask.read_bytes()).hexdigest()
    assert found.given_sha256 == hashlib.sha256(PICTURE).hexdigest()
    assert not np.array_equal(*map(decode_png, pictures))


def test_a_mask_by_keyboard_rubbed_out_inverted_and_cleared(page, tmp_path) -> None:
    def white() -> int:
        return (np.asarray(Image.open(saved(page, "#save-mask", tmp_path)).convert("L")) == 255).sum()

    give(page, "inpaint")
    page.locator("#mask").focus()
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#spot")).to_be_visible()
    page.keyboard.press("Space")
    one = white()
    for _ in range(4):
        page.locator("#mask").press("ArrowRight")
    page.keyboard.press("Space")
    both = white()
    assert one < both <= 2 * one
    page.locator("#rub").check()
    page.locator("#mask").press("Space")
    assert white() == one
    page.locator("#invert").click()
    assert white() == RESOLUTION**2 - one
    page.locator("#clear").click()
    expect(page.locator("#save-mask")).to_be_hidden()


def test_a_large_picture_has_a_mask_of_its_size(page, tmp_path) -> None:
    give(page, "inpaint", png(np.full((900, 1500, 3), 80, dtype=np.uint8)))
    paint(page)
    page.locator("#n").fill("1")
    draw(page)
    expect(page.locator("#notes")).to_have_text(
        f"Taken: the centred square of the picture, 1500 x 900, to {RESOLUTION} x {RESOLUTION}."
    )
    assert Image.open(saved(page, "#save-mask", tmp_path)).size == (1500, 900)


@pytest.mark.parametrize(
    ("task", "fields", "facts"),
    [
        ("upscale", {"factor": 4}, {"task": "super-resolution", "factor": 4, "repeats": 2}),
        ("colorize", {"label": "dog"}, {"task": "colorization", "label": "dog", "repeats": 2}),
        ("edit", {"label": "dog", "coarse": 4}, {"command": "edit", "strength": 0.8, "label": "dog", "coarse": 4}),
        ("vary", {"sampler": "ddim"}, {"command": "edit", "strength": 0.8, "sampler": "ddim", "label": None}),
    ],
)
def test_the_other_tasks(page, task, fields, facts) -> None:
    give(page, task, SMALL if task == "upscale" else PICTURE)
    page.locator("#n").fill("2")
    page.locator("#seed").fill("5")
    more(page, steps=3, **fields)
    if task in ("edit", "vary"):
        page.locator("#strength").fill("0.8")
        expect(page.locator("#strength-said")).to_have_text("0.8")
    else:
        page.locator("#repeats").fill("2")
    pictures = draw(page)
    assert len({receipt(data).pixels_sha256 for data in pictures}) == 2
    found = receipt(pictures[0])
    assert {name: getattr(found, name) for name in facts} == facts
    assert (found.seed, found.steps) == (5, 3)
    if task == "upscale":
        means = decode_png(pictures[0]).reshape(4, 4, 4, 4, 3).mean(axis=(1, 3))
        assert np.abs(means - VALUES[:4, :4]).max() < 30  # clipped and rounded: the weights are random


def test_an_edit_from_what_the_picture_is_has_one_result(page) -> None:
    give(page, "edit")
    more(page, steps=4, label="dog", from_label="cat")
    expect(page.locator("#n")).to_be_disabled()
    pictures = draw(page)
    assert [(receipt(data).from_label, receipt(data).label) for data in pictures] == [("cat", "dog")]
    page.locator("#from_label").select_option("")
    expect(page.locator("#n")).to_be_enabled()


def test_an_edit_stays_where_it_was_painted(page) -> None:
    give(page, "edit")
    paint(page)
    page.locator("#n").fill("1")
    more(page, steps=4, label="dog")
    picture = decode_png(draw(page)[0])
    assert np.array_equal(picture[:, :HALF], VALUES[:, :HALF])
    assert not np.array_equal(picture[:, HALF:], VALUES[:, HALF:])


def test_what_was_drawn_is_worked_on_and_comes_back_with_its_picture(page) -> None:
    page.locator("#n").fill("1")
    drawn = draw(page)
    page.locator("#tiles button").click()
    page.locator("#uses button", has_text="Vary").click()
    varied = draw(page)
    assert receipt(varied[0]).given_sha256 == hashlib.sha256(drawn[0]).hexdigest()
    give(page, "inpaint")
    paint(page)
    filled = draw(page)
    page.locator("#clear").click()
    page.locator("#history button").nth(1).click()
    expect(page.locator("input[value=vary]")).to_be_checked()
    assert draw(page) == varied
    page.locator("#history button", has_text="inpainting").click()
    assert draw(page) == filled  # with what was painted


def test_a_file_that_is_no_picture_and_none_at_all(page) -> None:
    page.locator("input[value=vary]").check(force=True)
    page.locator("#go").click()
    expect(page.locator("#error")).to_have_text("Choose a picture first.")
    page.locator("#file").set_input_files({"name": "words.txt", "mimeType": "text/plain", "buffer": b"no picture"})
    expect(page.locator("#error")).to_contain_text("words.txt cannot be shown as a picture")
    expect(page.locator("#board")).to_be_hidden()


@pytest.mark.parametrize("way", ["drop", "paste"])
def test_a_picture_is_dropped_or_pasted(page, way) -> None:
    page.locator("input[value=vary]").check(force=True)
    page.locator("#drop").evaluate(
        """(target, [way, bytes]) => {
        const carried = new DataTransfer();
        carried.items.add(new File([new Uint8Array(bytes)], "carried.png", {type: "image/png"}));
        const event = way === "drop" ? new DragEvent("drop", {dataTransfer: carried, bubbles: true, cancelable: true})
          : new ClipboardEvent("paste", {clipboardData: carried, bubbles: true});
        target.dispatchEvent(event); }""",
        [way, list(PICTURE)],
    )
    expect(page.locator("#picked")).to_contain_text("carried.png, 16 x 16 pixels")


@pytest.mark.parametrize(
    ("task", "n"),
    [
        ("draw", 1),
        ("draw", 2),
        ("inpaint", 1),
        ("inpaint", 2),
        ("upscale", 2),
        ("colorize", 1),
        ("edit", 1),
        ("vary", 2),
    ],
)
def test_the_command_draws_the_very_same(page, task, n, tmp_path) -> None:
    if task != "draw":
        give(page, task)
    if task in ("inpaint", "edit"):
        paint(page)
    page.locator("#n").fill(str(n))
    more(page, steps=3)
    if task != "vary":
        page.locator("#label").select_option("Straße & Co")
    pictures = draw(page)
    if task != "draw":
        # browsers put _ for the quotes
        saved(page, "#save-image", tmp_path).rename(tmp_path / NAME)
        assert (tmp_path / NAME).read_bytes() == PICTURE
    if task in ("inpaint", "edit"):
        saved(page, "#save-mask", tmp_path)
    assert commanded(page, tmp_path) == pictures


def test_the_command_of_a_prompt_of_all_letters_and_with_a_key(browser, one_thread, tmp_path) -> None:
    access = Access(keys=tmp_path / "keys.json")
    secret = add(access.keys, "web")
    prompt = '@it\'s; type="a" \\ $HOME `un` <b>très</b> 旗'
    with (
        served(Engine(reading_bundle(), slots=2), access=access) as served_here,
        opened(browser, str(served_here.base_url)) as page,
    ):
        page.locator("#key").fill(secret)
        page.keyboard.press("Enter")
        page.locator("#prompt").fill(prompt)
        page.locator("#n").fill("1")
        pictures = draw(page)
        assert receipt(pictures[0]).prompt == prompt
        assert commanded(page, tmp_path, KEY=secret) == pictures
        give(page, "colorize")
        pictures = draw(page)
        (tmp_path / NAME).write_bytes(PICTURE)
        assert commanded(page, tmp_path, KEY=secret) == pictures


def test_on_a_phone_nothing_is_wider_than_it(browser, one_thread) -> None:
    with (
        served(Engine(random_bundle(), slots=4)) as served_here,
        opened(browser, str(served_here.base_url), **PHONE) as page,
    ):
        expect(page.locator("#label")).to_be_visible()
        for task in ("draw", "upscale", "colorize", "edit", "vary", "inpaint"):
            if task == "draw":
                page.locator("#go").tap()
            else:
                give(page, task)
                more(page)
                page.locator("#terminal").evaluate("part => { part.open = true; }")
            shown(page)
            assert page.evaluate("() => document.documentElement.scrollWidth") <= 360, task
        paint(page, touch=True)
        page.locator("#go").tap()
        picture = decode_png(shown(page)[0])
        assert np.array_equal(picture[:, :HALF], VALUES[:, :HALF])
        assert not np.array_equal(picture[:, HALF:], VALUES[:, HALF:])
        page.locator("#tiles button").first.tap()
        box = page.locator("#large").bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 360


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_or_dark_as_the_system_is_and_never_faint(browser, client, scheme) -> None:
    with opened(browser, str(client.base_url), color_scheme=scheme) as page:
        expect(page.locator("#label")).to_be_visible()
        luminance = """one => { const [r, g, b] = getComputedStyle(one)[%s].match(/[\\d.]+/g).map(Number).map(
            v => v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4);
            return 0.2126 * r + 0.7152 * g + 0.0722 * b; }"""
        paper = page.locator("body").evaluate(luminance % "'backgroundColor'")
        assert (paper > 0.5) == (scheme == "light")
        for text, behind in (("#model", "body"), ("#hint", "#form"), ("#go", "#go"), ("#label", "#label")):
            ink = page.locator(text).evaluate(luminance % "'color'")
            ground = page.locator(behind).evaluate(luminance % "'backgroundColor'")
            light, dark = max(ink, ground), min(ink, ground)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, text  # [WCAG 2.2, 1.4.3]
