"""The page in a real Chromium, against a real server: what a person does, and what comes of it."""

import base64
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect

from diffusion.adapters.http import create_app
from diffusion.serving.engine import Engine
from diffusion.serving.keys import Access, add
from diffusion.serving.lineup import Lineup
from diffusion.serving.shelf import Shelf
from diffusion.store.bundle import Bundle
from tests.chromium import chromium, opened
from tests.integration.test_http import LIMITS, MODEL, URL, answering, idle, served
from tests.on_page import draw, more, receipt, shown
from tests.random_bundle import guided_bundle, random_bundle, reading_bundle, shaped_bundle
from tests.running_engine import OfEngines
from tests.test_distill import LESSON, STUDENT

pytestmark = pytest.mark.slow
TASKS = ["Draw", "Fill in", "Upscale", "Colorize", "Edit", "Vary"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def engine(one_thread: None) -> Engine:
    return Engine(random_bundle(), slots=LIMITS.slots, queue=LIMITS.queue, timeout_s=LIMITS.timeout_s)


@pytest.fixture(scope="module")
def client(engine: Engine) -> Iterator[httpx.Client]:
    with served(engine) as client:
        yield client


@pytest.fixture
def page(browser: Browser, client: httpx.Client) -> Iterator[Page]:
    with opened(browser, str(client.base_url)) as page:
        expect(page.locator("#label")).to_be_visible()
        yield page


def test_draws_what_the_form_says(page) -> None:
    page.locator("#label").select_option("dog")
    page.locator("#n").fill("2")
    page.locator("#seed").fill("7")
    more(page, steps=4, guidance=2, sampler="ddim")
    pictures = draw(page)
    found = [receipt(data) for data in pictures]
    assert [(each.label, each.seed, each.image, each.steps) for each in found] == [("dog", 7, 0, 4), ("dog", 7, 1, 4)]
    assert (found[0].sampler, found[0].guidance) == ("ddim", 2)
    expect(page.locator("#said")).to_contain_text("dog · seed 7 · 4 steps · ddim · guidance 2")


def test_shows_previews_before_the_pictures(page) -> None:
    page.evaluate(
        """() => { window.seen = []; new MutationObserver(found => window.seen.push(...found.filter(one =>
        one.target.nodeName === "IMG").map(one => one.target.parentElement.disabled))).observe(
        document.getElementById("tiles"), {attributes: true, attributeFilter: ["src"], subtree: true}); }"""
    )
    page.locator("#n").fill("1")
    more(page, steps=12)
    draw(page)
    assert page.evaluate("() => window.seen.length") >= 2  # after the first, which came with its element
    assert page.locator("#tiles img").count() == 1


def test_a_mistake_is_the_servers_sentence(page) -> None:
    for wrong, said in (
        ("-1", "at least 1"),
        ("1.5", "whole number"),
        ("1e15", "1 to 6"),
        ("7", "n=7: this server allows 1 to 6"),
    ):
        page.locator("#n").fill(wrong)
        page.locator("#go").click()
        expect(page.locator("#error")).to_contain_text(said)
    expect(page.locator("#run")).to_be_hidden()
    expect(page.locator("#n")).to_be_focused()
    page.locator("#n").fill("1")
    draw(page)


def test_one_of_several_models_is_chosen_and_a_run_comes_back_with_its_own(browser, one_thread) -> None:
    second = MODEL.model_copy(update={"version": "4", "digest": "9" * 64})
    engines = {"3": Engine(random_bundle(), slots=2), "4": Engine(guided_bundle(), slots=2)}
    shelf = Shelf(OfEngines(engines))
    shelf.change(Lineup(models=(MODEL, second)))
    with answering(create_app(shelf, LIMITS)) as client, opened(browser, str(client.base_url)) as page:
        expect(page.locator("#which option")).to_have_text(["tiny (version 3)", "tiny@4 (version 4)"])
        page.locator("#n").fill("1")
        more(page, steps=3)
        assert receipt(draw(page)[0]).version == "3"
        page.locator("#which").select_option("tiny@4")
        expect(page.locator("#model")).to_contain_text("version 4")
        page.locator("#n").fill("1")
        more(page, steps=3, guidance_kind="classifier_free")
        assert receipt(draw(page)[0]).version == "4"
        expect(page.locator("#curl")).to_contain_text('"model":"tiny@4"')
        page.locator("#history button").last.click()
        expect(page.locator("#which")).to_have_value("tiny")
        page.locator("#which").select_option("tiny@4")
        shelf.change(Lineup(models=(MODEL,)))
        page.locator("#go").click()
        expect(page.locator("#error")).to_contain_text("'tiny@4' is not served here, 'tiny' is")
        expect(page.locator("#choice")).to_be_hidden()
    shelf.close()


def test_a_server_that_is_gone_is_a_sentence(browser, one_thread) -> None:
    with ExitStack() as stack:
        with served(Engine(random_bundle(), slots=2)) as client:
            page = stack.enter_context(opened(browser, str(client.base_url)))
            expect(page.locator("#label")).to_be_visible()
        page.locator("#go").click()
        expect(page.locator("#error")).to_have_text("The server does not answer. Is it still running?")


def test_a_failure_in_the_middle_is_a_sentence_and_what_was_made_stays(page, engine, monkeypatch) -> None:
    before = draw(page)
    with monkeypatch.context() as patch:
        patch.setattr(engine.bundle.denoiser, "forward", lambda *a, **k: 1 / 0)
        page.locator("#go").click()
        expect(page.locator("#error")).to_have_text("the pictures could not be drawn; the server's log says why")
    assert [image.get_attribute("src") for image in page.locator("#tiles img").all()] == [
        "data:image/png;base64," + base64.b64encode(data).decode() for data in before
    ]
    expect(page.locator("#history button")).to_have_count(1)
    assert len(draw(page)) == 4


def test_words_for_a_model_that_reads_them(browser, one_thread) -> None:
    with served(Engine(reading_bundle(), slots=4)) as client, opened(browser, str(client.base_url)) as page:
        page.locator("#prompt").fill("un drapeau <b>très</b> 'rouge'")
        page.locator("#n").fill("1")
        page.locator("#prompt").press("Enter")
        assert receipt(shown(page)[0]).prompt == "un drapeau <b>très</b> 'rouge'"
        expect(page.locator("#said")).to_contain_text("un drapeau <b>très</b> 'rouge'")


def test_a_kept_seed_draws_the_same_and_another_something_else(page) -> None:
    page.locator("#n").fill("1")
    first, second = draw(page), draw(page)
    assert receipt(first[0]).seed != receipt(second[0]).seed
    expect(page.locator("#seed")).to_have_value(str(receipt(second[0]).seed))
    page.locator("#lock").check()
    assert draw(page) == second
    page.locator("#lock").uncheck()
    assert receipt(draw(page)[0]).seed != receipt(second[0]).seed
    page.locator("#seed").fill("")
    page.locator("#lock").check()  # of no seed one is drawn
    expect(page.locator("#seed")).not_to_have_value("")


def test_a_click_brings_back_what_was_made(page) -> None:
    page.locator("#n").fill("2")
    more(page, steps=3, sampler="ddim")
    first = draw(page)
    page.locator("#n").fill("1")
    page.locator("#label").select_option("dog")
    more(page, steps=4, sampler="dpmpp_2m")
    second = draw(page)
    runs = page.locator("#history button")
    expect(runs).to_have_count(2)
    page.locator("#n").fill("0")
    page.locator("#go").click()
    expect(page.locator("#error")).to_contain_text("at least 1")
    runs.nth(1).click()
    assert shown(page) == first
    fields = {name: page.locator(f"#{name}").input_value() for name in ("n", "label", "steps", "sampler", "seed")}
    seed = str(receipt(first[0]).seed)
    assert fields == {"n": "2", "label": "cat", "steps": "3", "sampler": "ddim", "seed": seed}
    assert draw(page) == first
    runs.nth(1).click()
    assert shown(page) == second


def test_a_picture_at_large_is_saved_as_it_came(page, tmp_path: Path) -> None:
    page.locator("#n").fill("3")
    pictures = draw(page)
    page.locator("#tiles button").nth(1).click()
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft"):  # there are three
        page.keyboard.press(key)
    expect(page.locator("#large-said")).to_contain_text("picture 2 of 3")
    with page.expect_download() as saved:
        page.locator("#save").click()
    saved.value.save_as(tmp_path / "saved.png")
    assert (tmp_path / "saved.png").read_bytes() == pictures[1]
    assert saved.value.suggested_filename == f"cat-{receipt(pictures[0]).seed}-1.png"
    page.keyboard.press("Escape")
    expect(page.locator("#large")).to_be_hidden()
    expect(page.locator("#tiles button").nth(1)).to_be_focused()


def test_everything_by_keyboard(page, engine) -> None:
    page.locator("input[value=draw]").focus()
    page.keyboard.press("Tab")
    expect(page.locator("#label")).to_be_focused()
    page.keyboard.type("dog")
    page.keyboard.press("Control+Enter")
    assert receipt(shown(page)[0]).label == "dog"
    page.keyboard.press("Tab")
    expect(page.locator("#n")).to_be_focused()
    page.keyboard.type("1")
    page.keyboard.press("Enter")
    assert len(shown(page)) == 1
    more(page, steps=1000)
    page.keyboard.press("Enter")
    expect(page.locator("#stop")).to_be_visible()
    expect(page.locator("#run-curl")).to_be_hidden()  # its seed is not known yet
    page.keyboard.press("Escape")
    expect(page.locator("#go")).to_be_enabled()
    assert idle(engine), "what was stopped is still being drawn"
    assert len(shown(page)) == 1
    expect(page.locator("#history button")).to_have_count(2)


def test_every_control_has_a_name(page) -> None:
    for value in ("draw", "inpaint", "upscale", "colorize", "edit", "vary"):
        page.locator(f"input[value={value}]").check(force=True)
        more(page)
        for control in page.locator("input:visible, select:visible, button:visible, canvas:visible").all():
            named = control.evaluate("one => (one.labels?.[0]?.innerText ?? one.ariaLabel ?? one.innerText).trim()")
            assert named, control.evaluate("one => one.outerHTML")


def test_tells_how_long_the_queue_is(page, client, engine, monkeypatch) -> None:
    gate, inner = threading.Event(), engine.bundle.denoiser.forward
    with ThreadPoolExecutor(1) as pool, monkeypatch.context() as patch:
        patch.setattr(engine.bundle.denoiser, "forward", lambda *a, **k: gate.wait(60) and inner(*a, **k))
        other = pool.submit(client.post, URL, json={"label": "cat", "n": 6, "steps": 2, "seed": 0})
        deadline = time.monotonic() + 20
        while engine.load()["waiting"] < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        page.locator("#n").fill("3")
        page.locator("#go").click()
        expect(page.locator("#load")).to_have_text("in the queue: 4 in work, 5 waiting")
        gate.set()
        assert other.result().status_code == 200
        assert len(shown(page)) == 3
    expect(page.locator("#load")).to_have_text("")


def student() -> Bundle:
    bundle = random_bundle()
    return Bundle(
        bundle.spec.model_copy(update={"lesson": LESSON, "sampling": STUDENT}), bundle.digest, bundle.denoiser
    )


@pytest.mark.parametrize(
    ("bundle", "tasks", "there", "absent"),
    [
        (student, ["Draw"], ["label", "n"], ["steps", "guidance", "sampler", "size", "guidance_kind", "prompt"]),
        (guided_bundle, TASKS, ["guidance_kind", "steps", "sampler", "guidance"], ["size", "prompt"]),
        (shaped_bundle, TASKS, ["size"], ["guidance_kind", "prompt", "strength", "factor", "given"]),
    ],
)
def test_offers_what_the_model_can_do(browser, one_thread, bundle, tasks, there, absent) -> None:
    with served(Engine(bundle(), slots=2)) as client, opened(browser, str(client.base_url)) as page:
        expect(page.locator("#label")).to_be_visible()
        more(page)
        assert page.locator(".tasks label:visible").all_inner_texts() == tasks
        assert [name for name in there if not page.locator(f"#{name}").is_visible()] == []
        assert [name for name in absent if page.locator(f"#{name}").is_visible()] == []
        if "size" in there:
            page.locator("#size").select_option("24x8")
        page.locator("#n").fill("1")
        assert receipt(draw(page)[0]).size == ("24x8" if "size" in there else None)


def test_asks_for_a_key_where_one_is_wanted(browser, one_thread, tmp_path: Path) -> None:
    access = Access(keys=tmp_path / "keys.json")
    secret = add(access.keys, "web")
    with (
        served(Engine(random_bundle(), slots=2), access=access) as client,
        opened(browser, str(client.base_url)) as page,
    ):
        expect(page.locator("#key")).to_be_focused()
        page.keyboard.type("dk-wrong")
        page.keyboard.press("Enter")
        expect(page.locator("#locked")).to_contain_text("not known here")
        page.keyboard.type(secret)
        page.keyboard.press("Enter")
        expect(page.locator("#unlock")).to_be_hidden()
        page.locator("#n").fill("1")
        assert receipt(draw(page)[0]).label == "cat"
        expect(page.locator("#curl")).to_contain_text('-H "Authorization: Bearer $KEY"')
        assert secret not in page.content()
