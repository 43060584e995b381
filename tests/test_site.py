"""The documentation as a site: built without a warning, read in a real Chromium from disk, without a network."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, ViewportSize

from tests.services.browser import chromium

ROOT = Path(__file__).resolve().parent.parent
DESKTOP: ViewportSize = {"width": 1280, "height": 900}
PHONE: ViewportSize = {"width": 360, "height": 740}
TEXTS = """() => { const view = document.documentElement.viewBox.baseVal
    return [...document.querySelectorAll('text')].map(e => { const box = e.getBBox()
        return [e.textContent, box.x > 4 && box.x + box.width < view.width - 4 && box.y + box.height < view.height] }) }"""
# Nobody answers there: whatever the build would fetch, it would not get.
NOWHERE = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
# Marks of Markdown that was not understood: a list or a table that hangs on a paragraph, a block with a language.
LEFT_OVER = """() => [...document.querySelectorAll('article p')].map(e => e.textContent)
    .filter(text => /^\\s*(- |\\d+\\. |\\|)|\\n(- |\\d+\\. |\\|)|```|\\]\\(/.test(text))"""
PICTURES = """() => [...document.querySelectorAll('article img')]
    .map(e => [e.getAttribute('src'), e.complete && e.naturalWidth > 100, e.alt.length > 0])"""


def build(root: Path, site: Path) -> subprocess.CompletedProcess[str]:
    """Build the site of a checkout into a folder."""
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(site)]
    environment = os.environ | NOWHERE | {"NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    built = tmp_path_factory.mktemp("site")
    done = build(ROOT, built)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return built


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


def test_every_page_is_drawn_quiet_and_loads_nothing_from_elsewhere(browser: Browser, site: Path) -> None:
    said: list[str] = []
    asked: list[str] = []
    pages = sorted(set(site.rglob("*.html")) - {site / "404.html"})  # which a server shows, wherever it is
    assert len(pages) > 40
    page = browser.new_page(viewport=DESKTOP)
    page.on("console", lambda message: said.append(f"{page.url}: {message.text}"))
    page.on("pageerror", lambda error: said.append(f"{page.url}: {error}"))
    page.on("request", lambda request: asked.append(request.url))
    for file in pages:
        page.goto(file.as_uri())
        name = file.relative_to(site).as_posix()
        for picture, drawn, described in page.evaluate(PICTURES):
            assert drawn, f"{name} does not show {picture}"
            assert described, f"{name} does not say what {picture} shows"
        assert page.evaluate(LEFT_OVER) == [], name
        page.set_viewport_size(PHONE)
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"], f"{name} scrolls sideways on a phone"
        page.set_viewport_size(DESKTOP)
    page.close()
    assert said == []
    assert [url for url in asked if not url.startswith((site.as_uri(), "data:"))] == []


@pytest.mark.parametrize("picture", sorted(path.name for path in (ROOT / "docs").glob("*.svg")))
def test_no_text_of_a_picture_is_cut_off(browser: Browser, picture: str) -> None:
    page = browser.new_page()
    page.goto((ROOT / "docs" / picture).as_uri())
    texts = page.evaluate(TEXTS)
    assert len(texts) > 10
    assert [text for text, inside in texts if not inside] == []
    page.close()


def test_search_finds_a_page_that_was_opened_from_disk(browser: Browser, site: Path) -> None:
    page = browser.new_page(viewport=DESKTOP)
    page.goto((site / "index.html").as_uri())
    page.focus("input[name=query]")
    page.keyboard.type("chronological order")
    first = page.locator(".md-search-result__link").first
    first.wait_for(timeout=60_000)
    assert "stream.html" in (first.get_attribute("href") or "")
    page.close()


def test_dark_pages_have_dark_ground(browser: Browser, site: Path) -> None:
    page = browser.new_page(viewport=DESKTOP, color_scheme="dark")
    page.goto((site / "index.html").as_uri())
    red, green, blue = map(int, page.evaluate("getComputedStyle(document.body).backgroundColor.match(/[0-9]+/g)")[:3])
    assert max(red, green, blue) < 80
    page.close()


def test_a_link_to_nothing_fails_the_build(tmp_path: Path) -> None:
    unneeded = shutil.ignore_patterns(".*", "runs", "build", "tests", "__pycache__", "*.egg-info")
    shutil.copytree(ROOT, tmp_path / "copy", ignore=unneeded)
    with (tmp_path / "copy/docs/glossary.md").open("a") as glossary:
        glossary.write("\n[one](nowhere.md) [two](stream.md#nothing) [three](../configs/nowhere.yaml)\n")
    (tmp_path / "copy/docs/forgotten.md").write_text("# Not in the navigation\n")
    done = build(tmp_path / "copy", tmp_path / "site")
    assert done.returncode == 1
    for fault in ("nowhere.md", "#nothing", "configs/nowhere.yaml", "forgotten.md"):
        assert fault in done.stderr
