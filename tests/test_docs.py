"""The documentation holds: the generated page is current, links lead somewhere, the commands for one's own log work."""

import ast
import re
import shlex
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import yaml

from ctrsink.cli import _parser, main
from ctrsink.config import load_run, load_study
from ctrsink.config.data import DataSpec, EncoderSpec, PrepareSpec, SplitSpec
from ctrsink.config.model import SinkSpec
from ctrsink.dataset.manifest import read_manifest
from ctrsink.dataset.reader import Dataset
from ctrsink.export.package import export_run
from ctrsink.features import registry, user
from ctrsink.features.histories import Histories
from ctrsink.features.numbers import number
from ctrsink.features.registry import SIGNALS
from ctrsink.serve import Scorer, request_of
from tests.serving_fixtures import run_spec, write_run
from tests.told_fixtures import evaluated, told_data

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *(ROOT / f"{name}/README.md" for name in ("benchmarks", "cluster"))])
BLOCK = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)|(?:src|href|srcset)=\"([^\"\s]+)\"")


def anchors(page: str) -> set[str]:
    """What a heading is called in an address, as GitHub does it."""
    titles = re.findall(r"^#+ (.*)$", BLOCK.sub("", page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", ["configuration", "cli"])
def test_a_page_that_is_made_is_the_one_that_the_code_gives(name: str, tmp_path: Path) -> None:
    made = tmp_path / f"{name}.md"
    subprocess.run([sys.executable, ROOT / f"docs/make_{name}.py", made], check=True, cwd=ROOT)
    assert made.read_text("utf-8") == (ROOT / f"docs/{name}.md").read_text("utf-8"), f"run docs/make_{name}.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_relative_links_lead_to_a_file_and_a_heading(page: Path) -> None:
    found = [a or b for a, b in LINK.findall(BLOCK.sub("", page.read_text("utf-8")))]
    for link in found:
        if "://" in link or link.startswith("mailto:"):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), f"{page.name} links to {link}, which does not exist"
        if anchor:
            assert anchor in anchors(target.read_text("utf-8")), f"{page.name} links to {link}, but there is no such heading"


@pytest.mark.parametrize("page", sorted({*PAGES} - {ROOT / "docs/cli.md"}), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_commands_are_those_of_the_command_line(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Verbs, options and keys; what they do, the tests of each verb say."""
    monkeypatch.chdir(ROOT)
    for line in re.findall(r"^(?:    )?(ctrsink [a-z].*)$", page.read_text("utf-8").replace("\\\n", " "), re.MULTILINE):
        args, rest = _parser().parse_known_args(shlex.split(line.replace('"$LLAMA"', ""), comments=True)[1:])
        assert [word for word in rest if "=" not in word] == [], line
        config = getattr(args, "config", "")
        if config.startswith("configs/studies/"):
            load_study(config)
        elif config.startswith("configs/") and "FAMILY" not in config:
            load_run(config, [*args.overrides, *rest])


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_files_that_are_named_are_there(page: Path) -> None:
    """From the root, the package, or beside the page."""
    named = re.findall(r"`([\w/]+/\w+\.(?:py|yaml))`", page.read_text("utf-8"))
    assert [name for name in named if not any((top / name).exists() for top in (ROOT, ROOT / "ctrsink", page.parent))] == []


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "docs").glob("*.svg")))
def test_pictures_are_well_formed_legible_and_bring_their_own_ground(name: str) -> None:
    root = ElementTree.parse(ROOT / "docs" / name).getroot()
    text = (ROOT / "docs" / name).read_text("utf-8")
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    ground = next(e for e in root if e.tag.endswith("}rect"))
    assert ground.attrib["fill"] == "#ffffff"
    assert (float(ground.attrib["width"]), float(ground.attrib["height"])) == (width - 2, height - 2)
    assert min(float(size) for size in re.findall(r"font-size: ([\d.]+)px", text)) >= 13


def test_the_examples_of_a_column_mapping_and_of_item_vectors_are_valid() -> None:
    page = (ROOT / "docs/data.md").read_text("utf-8")
    mapping, dates, vectors = (yaml.safe_load(body) for info, body in BLOCK.findall(page) if info == "yaml")
    assert PrepareSpec.model_validate(mapping["prepare"]).source.columns.user == "viewer"
    assert SplitSpec.model_validate(yaml.load(yaml.dump(dates["prepare"]["split"]), yaml.BaseLoader)).train_end == 1719187200
    assert EncoderSpec.model_validate(vectors["prepare"]["encoder"]).path.endswith("all-MiniLM-L6-v2")
    assert DataSpec.model_validate({"uri": "data", **vectors["data"]}).retrieve == 20
    assert "similarity" in SinkSpec.model_validate(vectors["model"]["sinks"]).signals


def test_the_examples_of_a_study_are_valid(tmp_path: Path) -> None:
    (example,) = (body for info, body in BLOCK.findall((ROOT / "docs/studies.md").read_text("utf-8")) if info == "yaml")
    for path in (ROOT / "configs").iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "own").mkdir()
    (tmp_path / "own/study.yaml").write_text(example)
    study, runs = load_study(tmp_path / "own/study.yaml")
    assert study.names == ["item_mean", "logistic", "lightgbm", "ctr-sink", "no-similarity", "lm-ctr", "ctr-sink-stacked"]
    assert runs["ctr-sink"].model.similarity == "neighbours"
    assert runs["no-similarity"].model.similarity is None
    assert runs["lm-ctr"].model.sinks is None
    for path in (ROOT / "configs/studies").iterdir():
        load_study(path)


def test_the_commands_for_ones_own_log_work_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (ROOT / "docs/data.md").read_text("utf-8")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    commands: list[str] = []
    for info, body in BLOCK.findall(page):
        kind, _, name = info.partition(" ")
        if kind == "csv":
            (tmp_path / name).write_text(body)
        elif info == "bash tested":
            commands += body.splitlines()
    assert commands
    for command in commands:
        program, *arguments = shlex.split(command)
        assert program == "ctrsink"
        assert main(arguments) == 0, command
    assert [part.events for part in read_manifest("runs/data/shop").parts] == [11, 6]
    assert read_manifest("runs/data/priced").text.item == "{title} for {price}"

    with (tmp_path / "events.csv").open("a") as log:
        log.write("dan,tea,yesterday,1\n")
    capsys.readouterr()
    assert main([*shlex.split(commands[0])[1:], "data.uri=runs/data/bad"]) == 2
    assert "    " + capsys.readouterr().err.splitlines()[-1] in page
    assert not (tmp_path / "runs/data/bad").exists()


def test_the_example_of_a_signal_is_prepared_trained_on_and_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs/add-a-signal.md").read_text("utf-8")
    function, line, plain = (body for info, body in BLOCK.findall(page) if info == "python")
    scope = {"np": np, "Histories": Histories}
    exec(function + plain, scope)
    monkeypatch.setattr(user, "since_last", scope["since_last"], raising=False)
    exec(f"added = {{{line}}}", added := dict(vars(registry)))
    for name, signal in added["added"].items():
        monkeypatch.setitem(SIGNALS, name, signal)
    registry.find.cache_clear()
    data = told_data(tmp_path, requests=True)
    spec = run_spec(data, str(tmp_path / "run"), model={"target": {"signals": ["since_last"]}})
    write_run(spec)
    export_run(spec.run_dir, str(tmp_path / "model"))
    scorer, dataset, expected = Scorer.load(str(tmp_path / "model")), Dataset(data.uri), evaluated(spec.run_dir, "test")
    for row, (who, event) in enumerate(zip(expected.users.tolist(), expected.events.tolist(), strict=True)):
        request = request_of(dataset, who, event)
        assert scorer.score(request)[0] == pytest.approx(expected.probabilities[row], abs=1e-5)
        assert scorer.score(request | {"timestamp": request["timestamp"] + 10**6})[0] != pytest.approx(
            expected.probabilities[row]
        )
    counts, unknown = np.zeros(5), np.full(5, np.nan)
    begins, known, times = np.array([0, 0, 0, 3, 3]), np.array([0, 1, 1, 0, 1]), np.array([5, 9, 9, 0, 100])
    few = Histories(begins, known, times, unknown, np.full(5, -1, np.int8), unknown, counts)
    np.testing.assert_allclose(number("since_last", few), [scope["plain_since_last"](few, row) for row in range(5)])
    registry.find.cache_clear()


def test_the_page_of_signals_has_each_signal_and_whom_it_is_told() -> None:
    page = (ROOT / "docs/signals.md").read_text("utf-8")
    told = {}
    for line in page.splitlines():
        if line.startswith("| `"):
            names, whom = line.split("|")[1:3]
            told |= dict.fromkeys(re.findall(r"`(\w+)`", names), whom.strip())
    words = {("behaviour",): "sinks", ("target",): "targets", ("behaviour", "target"): "both"}
    assert told == {name: words[signal.sides] for name, signal in SIGNALS.items()}


def test_recipes_have_no_figure_that_is_not_among_the_results() -> None:
    results, recipes = ((ROOT / "docs" / name).read_text("utf-8") for name in ("results.md", "recipes.md"))
    figures = set(re.findall(r"\d\.\d{3,}", recipes))
    assert len(figures) > 15
    assert figures - set(re.findall(r"\d\.\d{3,}", results)) == set()


def marks(module: ast.Module, name: str) -> set[str]:
    """Marks of a test that decide whether it runs: `slow`, `root`; of its module or its own."""
    (test,) = (node for node in module.body if isinstance(node, ast.FunctionDef) and node.name == name)
    of_module = [
        node.value for node in module.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark"
    ]
    found = [ast.unparse(mark) for mark in (*of_module, *test.decorator_list) if "parametrize" not in ast.unparse(mark)]
    return {mark for mark in ("slow", "root") if any(f"pytest.mark.{mark}" in text for text in found)}


def test_every_promise_names_a_test_that_is_there_and_says_when_it_runs() -> None:
    rows = re.findall(r"^\| (.*) \| `(tests/\w+\.py)::(\w+)` \|$", (ROOT / "docs/promises.md").read_text("utf-8"), re.MULTILINE)
    assert len(rows) > 40
    for promise, file, name in rows:
        told = re.search(r"\(\*(.*)\*\)$", promise)
        assert marks(ast.parse((ROOT / file).read_text("utf-8")), name) == set(told[1].split(", ") if told else []), name
