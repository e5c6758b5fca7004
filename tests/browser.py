"""A real browser: Debian's Chromium, driven by Playwright."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Page, sync_playwright

from tests import needs


@contextmanager
def browser_page(*, width: int, height: int) -> Iterator[Page]:
    """Yield a page of a browser that ends with the block."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=needs.CHROMIUM.path, args=["--no-sandbox"] if os.geteuid() == 0 else []
        )
        yield browser.new_page(viewport={"width": width, "height": height})
        browser.close()
