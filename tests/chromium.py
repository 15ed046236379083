"""A real Chromium, where the machine has one."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import Browser, Page, Request, expect, sync_playwright

expect.set_options(timeout=60_000)  # a busy machine takes its time; 5 s is what it would wait
NAMES = ("chromium", "chromium-browser", "google-chrome")


def executable() -> str | None:
    """Named by DIFFUSION_TEST_CHROMIUM, else on PATH."""
    return os.environ.get("DIFFUSION_TEST_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


@contextmanager
def chromium() -> Iterator[Browser]:
    """Skips the test where there is none."""
    path = executable()
    if path is None:
        pytest.skip(
            "no Chromium: `apt install chromium`, or `playwright install chromium` and DIFFUSION_TEST_CHROMIUM=its path"
        )
    with sync_playwright() as playwright:
        # the superuser of a container has no sandbox
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=path, args=sandbox)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def opened(browser: Browser, url: str, **context) -> Iterator[Page]:
    """The page there.  At its end it has asked nothing but its own origin, and its console has no error.

    Answers of 400 or more, and none, are told on the console as well: those are not held against it.
    """
    asked: list[Request] = []
    said: list[str] = []
    with browser.new_context(accept_downloads=True, **context) as made:
        made.grant_permissions(["clipboard-read", "clipboard-write"], origin=url)
        page = made.new_page()
        page.set_default_timeout(60_000)
        page.on("request", lambda request: asked.append(request))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("console", lambda line: said.append(line.text) if line.type in ("error", "warning") else None)
        page.goto(url)
        yield page
    foreign = [one.url for one in asked if not one.url.startswith((url, "data:", "blob:"))]
    assert foreign == []
    unwanted = [line for line in said if not line.startswith("Failed to load resource")]
    assert not unwanted, unwanted
