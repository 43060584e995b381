"""The files below configs/: every run loads, every fragment belongs to one."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from ctrsink.config import dump_run, load_run, parse_run
from ctrsink.errors import InputError

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text("utf-8"))


def included(path: Path) -> set[Path]:
    direct = {(path.parent / name).resolve() for name in read(path).get("include", [])}
    return direct | {deeper for p in direct for deeper in included(p)}


ALL = sorted(p.resolve() for p in CONFIGS.rglob("*.yaml"))
RUNS = [p for p in ALL if "run_dir" in read(p)]
FRAGMENTS = [p for p in ALL if "run_dir" not in read(p) and p.parent.name != "studies"]


def name_of(path: Path) -> str:
    return str(path.relative_to(CONFIGS))


def test_there_are_runs_and_fragments() -> None:
    assert RUNS
    assert FRAGMENTS


@pytest.mark.parametrize("path", RUNS, ids=name_of)
def test_every_run_loads(path: Path) -> None:
    spec = load_run(path)
    assert spec.run_dir
    assert parse_run(yaml.safe_load(dump_run(spec)), str(path)) == spec


def test_no_two_runs_share_a_folder() -> None:
    folders = [load_run(p).run_dir for p in RUNS]
    assert len(set(folders)) == len(folders)


@pytest.mark.parametrize("path", FRAGMENTS, ids=name_of)
def test_every_fragment_belongs_to_a_run(path: Path, tmp_path: Path) -> None:
    """Included by a run, or good on top of one."""
    if any(path in included(run) for run in RUNS):
        return
    errors = []
    for number, run in enumerate(RUNS):
        try:
            both = tmp_path / f"{number}.yaml"
            both.write_text(yaml.safe_dump({"include": [str(run), str(path)]}), "utf-8")
            load_run(both)
            return
        except InputError as error:
            errors.append(str(error))
    pytest.fail(f"{path} merges into no run: {errors}")


@pytest.mark.parametrize(
    "path", sorted(p for p in FRAGMENTS if p.parent.name == "model" and "backbone:" in p.read_text("utf-8")), ids=name_of
)
def test_every_backbone_takes_the_place_of_another(path: Path, tmp_path: Path) -> None:
    """Over the run that the README begins with, and every scale over both."""
    for scale in ("cpu-1", "gpu-16-zero3", "gpu-64", "gpu-128-full"):
        both = tmp_path / f"{scale}.yaml"
        layers = [CONFIGS / "ctr-sink.yaml", path, CONFIGS / f"scale/{scale}.yaml"]
        both.write_text(yaml.safe_dump({"include": list(map(str, layers))}), "utf-8")
        assert dump_run(load_run(both)).count("backbone:") >= 1
