"""The documentation holds: the generated page is current, links lead somewhere, the commands for one's own log work."""

import re
import shlex
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import yaml

from ctrsink.cli import main
from ctrsink.config import load_study
from ctrsink.config.data import DataSpec, EncoderSpec, PrepareSpec, SplitSpec
from ctrsink.config.model import SinkSpec
from ctrsink.dataset.manifest import read_manifest
from ctrsink.features.registry import SIGNALS

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(p for p in [ROOT / "README.md", ROOT / "cluster/README.md", *ROOT.glob("docs/*.md")] if p.is_file())
BLOCK = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)|(?:src|href|srcset)=\"([^\"\s]+)\"")


def anchors(page: str) -> set[str]:
    """What a heading is called in an address, as GitHub does it."""
    titles = re.findall(r"^#+ (.*)$", BLOCK.sub("", page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_page_of_the_configuration_is_the_one_that_the_code_gives(tmp_path: Path) -> None:
    made = tmp_path / "configuration.md"
    subprocess.run([sys.executable, ROOT / "docs/make_configuration.py", made], check=True, cwd=ROOT)
    assert made.read_text("utf-8") == (ROOT / "docs/configuration.md").read_text("utf-8"), "run docs/make_configuration.py"


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


@pytest.mark.parametrize("name", ["architecture.svg", "sequence.svg"])
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


def test_the_page_of_signals_has_each_signal_and_whom_it_is_told() -> None:
    page = (ROOT / "docs/signals.md").read_text("utf-8")
    told = {}
    for line in page.splitlines():
        if line.startswith("| `"):
            names, whom = line.split("|")[1:3]
            told |= dict.fromkeys(re.findall(r"`(\w+)`", names), whom.strip())
    words = {("behaviour",): "sinks", ("target",): "targets", ("behaviour", "target"): "both"}
    assert told == {name: words[signal.sides] for name, signal in SIGNALS.items()}
