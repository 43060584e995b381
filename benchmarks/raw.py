"""The log that a benchmark works on: synthetic, of a given size, or the one that a configuration names."""

from pathlib import Path

import yaml

from ctrsink.config import load_run
from ctrsink.errors import InputError
from ctrsink.prepare.build import prepare
from ctrsink.prepare.synth import synth

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def synthetic_log(folder: Path, events: int) -> Path:
    """Make a log of so many events below `folder`; returns the configuration of a run that prepares it."""
    synth(str(folder / "raw"), events)
    fragments = ("data/synthetic.yaml", "model/tiny-llama.yaml", "stages/align-then-all.yaml")
    run = {
        "include": [str(CONFIGS / name) for name in fragments],
        "run_dir": str(folder / "run"),
        "prepare": {"source": {"path": str(folder / "raw/events"), "items": str(folder / "raw/items.csv")}},
        "data": {"uri": str(folder / "data")},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(run))
    return path


def prepared_data(folder: Path, events: int, config: str | None, overrides: list[str]) -> str:
    """Prepare the log of `config`, or a synthetic one, below `folder`; returns the data set's folder.

    Raises:
        InputError: the configuration or its log cannot be used.
    """
    spec = load_run(config or synthetic_log(folder, events), overrides).prepare
    if spec is None:
        raise InputError(f"{config} has no section prepare: say there what the raw log is")
    prepare(spec, str(folder / "data"))
    return str(folder / "data")
