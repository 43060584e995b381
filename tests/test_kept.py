"""What a run keeps carries a version: an older program answers what a newer one kept in one line that names the file."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from ctrsink import kept, storage
from ctrsink.dataset.reader import Dataset
from ctrsink.errors import InputError, RunError
from ctrsink.export.package import export_run
from ctrsink.families.registry import source_of
from ctrsink.run import repeats
from ctrsink.run.folder import read_result
from ctrsink.stream.stream import TrainStream
from ctrsink.train.checkpoint.checkpoint import BEST, MARKER, STATE, find_checkpoint, list_checkpoints, load_checkpoint
from tests.builders import layout_of, make_dataset
from tests.command_line import call, content, good, refused
from tests.runs import prepared_data, run_tree


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of four steps with a best checkpoint."""
    folder = tmp_path_factory.mktemp("kept")
    tree = run_tree(prepared_data(str(folder / "data")), str(folder / "run"))
    tree["train"] |= {"validation": {"every": 2, "sequences": 4}, "keep": {"best": "logloss"}}
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    good("train", "--config", folder / "run.yaml", "stages.0.steps=2", "stages.1.steps=2", "evaluate.splits=[valid]")
    repeats.record(str(folder / "run"), 0, RunError("out of memory"))
    return folder / "run"


def newer(path: Path) -> bytes:
    """Write the file as a newer program would; returns what it was."""
    before = path.read_bytes()
    tree = json.loads(before)
    assert tree.pop("version") == kept.VERSION
    path.write_text(json.dumps({"version": kept.VERSION + 1, "of_tomorrow": True, **tree}))
    return before


def test_every_file_that_is_read_again_says_that_it_is_newer(run: Path) -> None:
    newest = Path(list_checkpoints(str(run))[0])
    reads: dict[Path, Callable[[], Any]] = {
        newest / MARKER: lambda: load_checkpoint(str(newest)),
        newest.parent / BEST: lambda: find_checkpoint(str(run), "best"),
        run / "result.json": lambda: read_result(str(run)),
        run / "failures" / "rank-0.json": lambda: repeats.given_up(str(run)),
        run / "evaluation" / "valid.json": lambda: export_run(str(run), str(run.parent / "model")),
    }
    for path, read in reads.items():
        before = newer(path)
        with pytest.raises(InputError, match=rf"^{path} was written by a newer ctrsink \(version 2, this one reads up to 1\)"):
            read()
        path.write_bytes(before)


def test_a_checkpoint_of_a_newer_program_is_neither_damaged_nor_passed_over(run: Path) -> None:
    newest = Path(list_checkpoints(str(run))[0])
    before = newer(newest / STATE), newer(newest / MARKER)
    marker = json.loads(before[1])
    state = (newest / STATE).read_bytes()
    marker[STATE] = {"bytes": len(state), "sha256": storage.sha256(state)}
    (newest / MARKER).write_text(json.dumps(marker))
    files = content(run)
    line = f"{newest / STATE} was written by a newer ctrsink (version 2, this one reads up to 1): go on with that one"
    refused(call("evaluate", "--run", run), line)
    refused(call("export", "--run", run, "--to", run.parent / "other"), line)
    refused(call("train", "--config", run.parent / "run.yaml", "stages.0.steps=2", "stages.1.steps=2", "evaluate.splits=[valid]",
                 "--resume"), line)  # fmt: skip
    changed = {name for name, digest in content(run).items() if files.get(name) != digest}
    assert changed <= {"config.yaml", "data.sha256"}
    (newest / STATE).write_bytes(before[0])
    (newest / MARKER).write_bytes(before[1])


def test_the_state_of_a_stream(tmp_path: Path) -> None:
    source = source_of(Dataset(make_dataset(tmp_path)), "train", layout_of("per_target"))
    stream = TrainStream(source, 0, 2, 4, 1, 0, 1)
    with pytest.raises(InputError, match="the state of the stream was written by a newer ctrsink"):
        stream.load_state_dict({"version": kept.VERSION + 1, "position": 8})
    assert stream.position == 0


@pytest.mark.parametrize("tree", [[], 3, None, {"version": "2"}, {"version": 0}, {"version": True}, {"version": 1.5}])
def test_what_was_never_stamped_is_not_taken_for_old(tree: Any) -> None:
    with pytest.raises(ValueError, match="not what was written"):
        kept.opened(tree, "x")


def test_what_was_kept_before_there_were_versions_is_of_the_first() -> None:
    assert kept.opened({"step": 3}, "x") == {"step": 3}
    assert kept.opened(kept.stamped({"step": 3}), "x") == {"step": 3}
