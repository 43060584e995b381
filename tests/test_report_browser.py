"""Pages of `ctrsink report` in a real headless Chromium: nothing is loaded or complained of, all is drawn and can be read."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Browser

from ctrsink.report.environment import written
from ctrsink.report.look_sections import look_sections
from ctrsink.report.page import Page, render
from ctrsink.studies.report import write_report
from tests.measured_runs import write_run
from tests.runs import prepared_data
from tests.services.browser import chromium
from tests.test_report import ROWS

VIEWS: dict[str, dict[str, Any]] = {
    "desktop": {"viewport": {"width": 1280, "height": 900}},
    "dark": {"viewport": {"width": 1280, "height": 900}, "color_scheme": "dark"},
    "phone": {"viewport": {"width": 390, "height": 844}},
    "dark phone": {"viewport": {"width": 360, "height": 640}, "color_scheme": "dark"},
}
FIGURES = """() => [...document.querySelectorAll('figure')].map(figure => {
    const svg = figure.querySelector('svg'), box = svg.getBoundingClientRect()
    const seen = s => { const b = s.getBoundingClientRect(); return b.width + b.height > 1 }
    const shapes = [...svg.querySelectorAll('path, use')].filter(seen)
    const texts = [...svg.querySelectorAll('text')].map(t => ({box: t.getBoundingClientRect(), text: t.textContent,
        size: parseFloat(getComputedStyle(t).fontSize) * box.width / svg.viewBox.baseVal.width}))
    return {width: box.width, height: box.height, shapes: shapes.length, smallest: Math.min(...texts.map(t => t.size)),
        cut: texts.filter(t => t.box.left < box.left - 4 || t.box.right > box.right + 4).map(t => t.text),
        caption: figure.querySelector('figcaption').textContent}
})"""
# Contrast as in WCAG 2; what stands on a coloured field of a figure is in the page's colour, and is left out.
CONTRASTS = """() => {
    const light = c => { const [r, g, b] = c.match(/[0-9.]+/g).map(Number).map(v => v / 255)
        .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b }
    const behind = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor
        if (c !== 'rgba(0, 0, 0, 0)') return c } }
    return [...document.querySelectorAll('h1, h2, p, dt, dd, td, th, caption, figcaption, summary, pre, a, svg text')].map(e => {
        const style = getComputedStyle(e), front = e.closest('svg') ? style.fill : style.color, back = behind(e)
        const [a, b] = [light(front), light(back)].sort((x, y) => y - x)
        return [front === back ? 21 : (a + 0.05) / (b + 0.05), e.textContent.slice(0, 40), front, back]
    }).filter(found => found[0] < 4.5)
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The pages of a run, of a study, and of a look into a model of twelve layers."""
    top = tmp_path_factory.mktemp("pages")
    data = prepared_data(str(top / "set"))
    for name, skill in (("a-variant-with-quite-a-long-name", 0.2), ("b", 1.0), ("c", 1.5)):
        for seed in (0, 1):
            folder = Path(write_run(top / "study" / name / f"seed-{seed}", data, name, seed, skill))
            (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for name, folder in (("run", top / "study" / "b" / "seed-0"), ("study", top / "study")):
        write_report(str(folder), str(top / f"{name}.html"), sequences=0)
    shares = np.linspace(0.05, 0.9, 12 * 9).reshape(12, 9)
    layers = {f"layer{number:02}": heads.tolist() for number, heads in enumerate(shares)}
    signals = {f"signal_{number}": {"auc": 0.01 - number / 1000, "logloss": 0.01} for number in range(14)}
    found = {
        "split": "valid",
        "impressions": 100,
        "attention_to_sinks": dict.fromkeys(("untrained", "trained", "without_bias"), layers),
        "signals": signals,
    }
    (top / "look.html").write_text(render(Page("look", "run", "nowhere", look_sections(found), (), written())))
    return {name: top / f"{name}.html" for name in ("run", "study", "look")}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("name", ["run", "study", "look"])
def test_a_page_is_drawn_and_legible(browser: Browser, pages: dict[str, Path], name: str, view: str) -> None:
    said: list[str] = []
    asked: list[str] = []
    with browser.new_context(**VIEWS[view]) as context:
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(pages[name].as_uri())
        figures = page.evaluate(FIGURES)
        assert page.evaluate("document.documentElement.scrollWidth") <= VIEWS[view]["viewport"]["width"]
        assert page.evaluate(CONTRASTS) == []
    assert said == []
    assert asked == [pages[name].as_uri()]
    assert len(figures) > 4
    for figure in figures:
        assert figure["width"] > 250, figure
        assert figure["height"] > 50, figure
        assert figure["shapes"] > 6, figure  # more than a frame and its ticks
        assert figure["cut"] == [], figure
        assert figure["smallest"] > 7, figure


@pytest.mark.parametrize("name", ["run", "study"])
def test_paper_is_white_and_has_what_is_folded_on_a_screen(browser: Browser, pages: dict[str, Path], name: str) -> None:
    with browser.new_context(color_scheme="dark") as context:
        page = context.new_page()
        page.goto(pages[name].as_uri())
        folded = "[...document.querySelectorAll('pre')].map(e => e.checkVisibility({contentVisibilityAuto: true}))"
        assert not any(page.evaluate(folded))
        page.emulate_media(media="print", color_scheme="dark")
        page.wait_for_function(f"{folded}.every(Boolean)", timeout=10_000)  # the browser unfolds with its next frame
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert page.evaluate(CONTRASTS) == []
        assert page.pdf(format="A4").startswith(b"%PDF")
