"""What a person does on the page, for its tests."""

import base64

from playwright.sync_api import Page, expect

from diffusion.serving.receipt import AnyReceipt
from diffusion.serving.receipt import opened as read


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
