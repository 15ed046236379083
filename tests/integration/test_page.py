"""The page in a real Chromium, against a real server: what a person does, and what comes of it."""

import base64
from collections.abc import Iterator
from contextlib import ExitStack

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect

from diffusion.serving.engine import Engine
from diffusion.serving.receipt import AnyReceipt
from diffusion.serving.receipt import opened as read
from tests.chromium import chromium, opened
from tests.integration.test_http import LIMITS, served
from tests.random_bundle import random_bundle, reading_bundle

PHONE = {"viewport": {"width": 360, "height": 640}, "has_touch": True, "is_mobile": True}


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


def more(page: Page, **fields: object) -> None:
    """Fill in what stands under "More settings", or beside it."""
    page.locator("details", has_text="More settings").evaluate("part => { part.open = true; }")
    for name, value in fields.items():
        control = page.locator(f"#{name}")
        if control.evaluate("control => control.tagName") == "SELECT":
            control.select_option(str(value))
        else:
            control.fill(str(value))


def draw(page: Page) -> list[bytes]:
    """Ask, and wait.  Returns the PNGs on the page."""
    page.locator("#go").click()
    return shown(page)


def shown(page: Page) -> list[bytes]:
    expect(page.locator("#go")).to_be_enabled()
    expect(page.locator("#error")).to_have_text("")
    expect(page.locator("#tiles button:disabled")).to_have_count(0)
    sources = [image.get_attribute("src") for image in page.locator("#tiles img").all()]
    assert sources
    return [base64.b64decode(source.removeprefix("data:image/png;base64,")) for source in sources]


def receipt(data: bytes) -> AnyReceipt:
    found = read(data)
    assert found.intact
    return found.receipt


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
    page.locator("#n").fill("7")
    page.locator("#go").click()
    expect(page.locator("#error")).to_contain_text("n=7: this server allows 1 to 6")
    expect(page.locator("#n")).to_be_focused()
    page.locator("#n").fill("1")
    draw(page)


def test_a_server_that_is_gone_is_a_sentence(browser, one_thread) -> None:
    with ExitStack() as stack:
        with served(Engine(random_bundle(), slots=2)) as client:
            page = stack.enter_context(opened(browser, str(client.base_url)))
            expect(page.locator("#label")).to_be_visible()
        page.locator("#go").click()
        expect(page.locator("#error")).to_have_text("The server does not answer. Is it still running?")


def test_words_for_a_model_that_reads_them(browser, one_thread) -> None:
    with served(Engine(reading_bundle(), slots=4)) as client, opened(browser, str(client.base_url)) as page:
        page.locator("#prompt").fill("un drapeau <b>très</b> 'rouge'")
        page.locator("#n").fill("1")
        page.locator("#prompt").press("Enter")
        assert receipt(shown(page)[0]).prompt == "un drapeau <b>très</b> 'rouge'"
        expect(page.locator("#said")).to_contain_text("un drapeau <b>très</b> 'rouge'")
