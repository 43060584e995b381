"""A real headless Chromium: the one that PATH or CTRSINK_CHROMIUM names, or the one that Playwright installed."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Browser, sync_playwright

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def executable() -> str | None:
    """The browser to start; None: Playwright's own."""
    return os.environ.get("CTRSINK_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


@contextmanager
def chromium() -> Iterator[Browser]:
    """The browser while it runs; `make browser` installs one where there is none."""
    # Root has no sandbox in Chromium; pages here are the project's own, and load nothing.
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable(), args=arguments)
        try:
            yield browser
        finally:
            browser.close()


if __name__ == "__main__":
    with chromium() as started:
        print(started.version)
