"""`ctrsink report`: the page says all that a folder holds and why the rest is missing, and nothing in it is a user's HTML."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from ctrsink import storage
from ctrsink.report.drawing import as_svg
from ctrsink.report.pace import mean_rates, most_memory, time_spent
from ctrsink.report.page import Figure, Listing, Note, Page, Section, Table, render, without_secrets
from ctrsink.studies.report import write_report
from tests.command_line import call, content, good, refused
from tests.measured_runs import write_run
from tests.runs import prepared_data, run_tree

HOSTILE = "<script>alert(1)</script><img src=x onerror=y>&\"'$\\frac{$"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return prepared_data(str(tmp_path_factory.mktemp("report-data") / "set"))


@pytest.fixture(scope="module")
def run(data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was measured, with two stages in its metrics and no checkpoint: its model cannot be loaded."""
    folder = Path(write_run(tmp_path_factory.mktemp("report-run") / "run", data, "one", 0, splits=("valid", "test")))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder


ROWS: list[dict[str, Any]] = [
    {"step": step, "stage": "all", "position": 8 * step, "loss": 0.7 - step / 100, "impressions_per_s": 40.0}
    | {"tokens_per_s": 300.0, "tflops": 0.1, "data_wait": 0.25, "memory_gib/rank0": 1.0, "memory_gib/rank1": 1.5}
    for step in (1, 2, 3, 4)
]


class Tags(HTMLParser):
    """Names and attributes of all elements, and the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def addresses(html: str) -> list[str]:
    """Whatever a browser could load: all but places within the page."""
    found = [
        str(attrs[name]) for _, attrs in Tags(html).tags for name in ("src", "href", "xlink:href", "srcset") if name in attrs
    ]
    found += re.findall(r"url\(([^)]*)\)|@import", html)
    return [address for address in found if not address.strip("'\"").startswith(("#", "data:,"))]


def test_a_run_is_told_whole_and_the_page_is_one_file(run: Path, tmp_path: Path) -> None:
    before = content(run)
    found = good("report", run, "--to", tmp_path / "page.html")
    assert content(run) == before
    assert found["report"] == str(tmp_path / "page.html")
    # No checkpoint: just what needs the model is missing, and says so.
    assert set(found["missing"]) == {"Attention to sinks", "Signals"}
    assert "holds no whole checkpoint yet" in found["missing"]["Signals"][0]
    html = (tmp_path / "page.html").read_text()
    page = Tags(html)
    for part in ("Loss by stage", "Reliability", "Slices", "Throughput and time", "Configuration", "Environment", "0 to 9"):
        assert part in page.text
    evaluation = json.loads((run / "evaluation" / "test.json").read_text())
    assert f"{evaluation['auc']:.4f}" in page.text
    assert len([tag for tag, _ in page.tags if tag == "figure"]) == len([tag for tag, _ in page.tags if tag == "svg"]) > 12
    assert addresses(html) == []
    assert {tag for tag, _ in page.tags} & {"script", "iframe", "object", "embed", "form", "base"} == set()
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert any("default-src 'none'" in str(attrs.get("content")) for tag, attrs in page.tags if tag == "meta")


def test_what_a_study_compares_is_what_its_page_shows(data: str, tmp_path: Path) -> None:
    folder = tmp_path / "study"
    for name, skill in (("weak", 0.1), ("strong", 1.5)):
        for seed in (0, 1):
            write_run(folder / name / f"seed-{seed}", data, name, seed, skill)
    write_run(folder / "unmeasured" / "seed-0", data, "unmeasured", 0, splits=())
    order = {"baseline": "weak", "variants": {"weak": {}, "strong": {}}, "split": "test"}
    (folder / "study.json").write_text(json.dumps(order))
    found = good("report", folder, "--to", tmp_path / "page.html")
    assert found["of"] == "study study"
    assert "unmeasured/seed-0 was not measured on test" in found["missing"]["Comparison"][0]
    text = Tags((tmp_path / "page.html").read_text()).text
    compared = good("compare", *(folder / name / f"seed-{seed}" for name in ("weak", "strong") for seed in (0, 1)))
    assert f"{compared['variants']['strong']['difference']['auc']['mean']:+.4f}" in text
    assert "less weak" in text
    (folder / "study.json").write_text("{")
    refused(call("report", folder, "--to", tmp_path / "page.html"), "study.json is damaged")


@pytest.mark.parametrize(
    ("remove", "section", "why"),
    [
        ("metrics.jsonl", "Loss by stage", "has not made a step"),
        ("evaluation", "Metrics", "was not measured on test: run `ctrsink evaluate"),
        ("evaluation/test.parquet", "Slices", "was not measured on test"),
        ("result.json", None, ""),
    ],
)
def test_what_is_missing_is_said_in_its_place(run: Path, tmp_path: Path, remove: str, section: str | None, why: str) -> None:
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run" / remove
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    found = good("report", tmp_path / "run", "--to", tmp_path / "page.html", "--sequences", 0)
    if section is not None:
        assert any(why in told for told in found["missing"][section])
    else:
        assert "no training process has ended" in Tags((tmp_path / "page.html").read_text()).text


@pytest.mark.parametrize(
    ("name", "why"), [("metrics.jsonl", "metrics.jsonl, line 1 is damaged"), ("evaluation/test.json", "test.json is damaged")]
)
def test_a_damaged_file_is_said_in_its_place(run: Path, tmp_path: Path, name: str, why: str) -> None:
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / name).write_bytes(b"{half\n")
    found = good("report", tmp_path / "run", "--to", tmp_path / "page.html", "--sequences", 0)
    assert any(why in told for told in found["missing"]["Metrics"])


def test_a_data_set_that_is_gone_or_another_is_told(data: str, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "set")
    folder = Path(write_run(tmp_path / "run", str(tmp_path / "set"), "one", 0))
    (folder / "data.sha256").write_text("0" * 64)
    found = good("report", folder, "--to", tmp_path / "page.html", "--sequences", 0)
    assert "is not the one that was trained on" in Tags((tmp_path / "page.html").read_text()).text
    shutil.rmtree(tmp_path / "set")
    found = good("report", folder, "--to", tmp_path / "page.html", "--sequences", 0)
    assert "set" in found["missing"]["Data"][0]
    assert "There are none" in found["missing"]["Slices"][0]


def test_what_is_no_run_is_refused_and_nothing_written(tmp_path: Path, run: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(call("report", tmp_path / "empty", "--to", tmp_path / "page.html"), "holds neither a run nor a study")
    refused(call("report", run, "--to", f"{tmp_path}/"), "is a folder: name the file of the page")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty"]


def test_a_run_and_its_page_on_s3(run: Path, s3_server: Any) -> None:
    storage.upload_dir(str(run), "s3://ctrsink-test/report/run")
    write_report("s3://ctrsink-test/report/run/", "s3://ctrsink-test/report/page.html", sequences=0)
    assert b"Reliability" in storage.read_bytes("s3://ctrsink-test/report/page.html")


def page_of(text: str) -> Page:
    """A page in every place of which `text` stands."""

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        axes.plot([1, 2], [1, 2], label=f"x{text}")
        axes.set_title(text)
        axes.legend()

    parts = [
        Table((text, text), [(text, text)], text, folded=text),
        Table((), [(text,)]),
        Figure(text, draw),
        Note(text),
        Listing(text, text),
    ]
    return Page(text, text, text, [Section(text, parts, text)], [(text, text, text)], text)


@pytest.mark.parametrize("text", [HOSTILE, "--> ]]> <!--", "</style></svg></title>"])
def test_a_name_is_text_wherever_it_stands(text: str) -> None:
    plain, hostile = Tags(render(page_of("name"))), Tags(render(page_of(text)))
    tags = [tag for tag, _ in hostile.tags]
    assert [tag for tag in tags if tag not in ("path", "use", "g", "defs", "text")] == [
        tag for tag, _ in plain.tags if tag not in ("path", "use", "g", "defs", "text")
    ]
    assert not any(name.startswith("on") for _, attrs in hostile.tags for name in attrs)
    assert text in hostile.text


@settings(max_examples=30)
@given(st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), min_size=1, max_size=12))
def test_any_text_is_escaped_in_a_table(text: str) -> None:
    page = Page(text, "run", "folder", [Section("s", [Table((text,), [(text,)])])])
    plain = Page("x", "run", "folder", [Section("s", [Table(("x",), [("x",)])])])
    assert [tag for tag, _ in Tags(render(page)).tags] == [tag for tag, _ in Tags(render(plain)).tags]


def test_a_figure_has_the_colours_of_the_page_and_the_same_bytes_again() -> None:
    def draw(figure: Any) -> None:
        figure.subplots().plot([1, 2], [2, 1], color="#1f5fa8")

    svg = as_svg(draw, (4, 3), "one", "a line")
    assert svg == as_svg(draw, (4, 3), "one", "a line")
    assert svg.startswith('<svg viewBox="0 0 288 216" role="img" aria-label="a line">')
    assert "stroke: var(--c0)" in svg
    assert "#1f5fa8" not in svg
    assert "#000000" not in svg


def test_passwords_in_addresses_are_blotted_out() -> None:
    told = without_secrets(
        "address: ray://me:hunter2@host:1\nuri: s3://bucket/a\nx: https://h/p?token=abc&part=2&X-Amz-Signature=f"
    )
    assert told == "address: ray://***@host:1\nuri: s3://bucket/a\nx: https://h/p?token=***&part=2&X-Amz-Signature=***"
    hard = "ray://me:p@ss@host https://user:p/w@h/x s3://bucket/a@b/c http://h?api_key=1&AWSAccessKeyId=2&sig=3&n=4"
    assert (
        without_secrets(hard)
        == "ray://***@host https://***@h/x s3://bucket/a@b/c http://h?api_key=***&AWSAccessKeyId=***&sig=***&n=4"
    )


def test_time_is_divided_by_what_the_rows_say() -> None:
    result = {"seconds": 2.0, "impressions": 96}
    # 32 sequences with three impressions each at 40 impressions a second: 2.4 s between the rows, of which the steps took 2.0.
    rows = [*ROWS[:3], ROWS[3] | {"checkpoint_s": 0.1}, ROWS[3] | {"checkpoint_s": 0.1}]
    spent = time_spent(rows, result)
    assert spent == pytest.approx(
        {
            "computing steps": 1.4,
            "waiting for data": 0.6,
            "standing still for checkpoints": 0.1,
            "validation, reports and the rest": 0.3,
        }
    )
    assert mean_rates(rows, result) == pytest.approx({"impressions_per_s": 40, "tokens_per_s": 300, "tflops": 0.1})
    assert most_memory(rows) == {"memory_gib": 1.5}
    assert time_spent([], {}) == mean_rates([], {}) == {}


def test_a_run_that_was_stopped_tells_what_it_has(data: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(run_tree(data, str(tmp_path / "run"))))
    assert call("train", "--config", tmp_path / "config.yaml", "--stop-after", 10).code in (0, 143)
    found = good("report", tmp_path / "run", "--to", tmp_path / "page.html", "--sequences", 4)
    text = Tags((tmp_path / "page.html").read_text()).text
    assert "Stage align: log loss" in text
    assert "Stage all: log loss" in text
    assert "By layer and head, before training" in text
    assert "10 steps so far" in text
    assert set(found["missing"]) == {"Metrics", "Reliability", "Slices", "Signals"}
    assert "Targets are told no number" in found["missing"]["Signals"][0]


def test_of_a_large_data_set_the_counts_alone_are_told(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctrsink.report.data_section.MOST_EVENTS", 10)
    found = good("report", run, "--to", tmp_path / "page.html", "--sequences", 0)
    assert "more than 10 events would be read" in found["missing"]["Data"][0]
    assert "420" in Tags((tmp_path / "page.html").read_text()).text
