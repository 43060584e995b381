"""Checkpoints that are signed with a key are opened with that key alone, however well their hashes fit."""

import json
import logging
from pathlib import Path

import pytest

from ctrsink.config import parse_run
from ctrsink.errors import InputError
from ctrsink.runtime.start import start
from ctrsink.train.checkpoint.checkpoint import MARKER, DamagedCheckpoint, find_checkpoint, folder_of, read_marker, write_marker
from ctrsink.train.checkpoint.signature import KEY, NAME
from tests.runs import prepared_data, run_tree

ENTRIES = {name: {"bytes": 1, "sha256": "a"} for name in ("parameters.safetensors", "moments.safetensors", "state.json")}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A marker that was signed with the key `one`."""
    monkeypatch.setenv(KEY, "one")
    (tmp_path / "step-00000001").mkdir()
    write_marker(str(tmp_path / "step-00000001"), ENTRIES)
    return tmp_path / "step-00000001"


def test_the_key_opens_it_and_no_key_asks_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_marker(str(folder)).keys() == ENTRIES.keys()
    monkeypatch.delenv(KEY)
    assert read_marker(f"{folder}/").keys() == ENTRIES.keys()


def test_another_key_a_changed_marker_or_another_place_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.rename(folder.with_name("step-00000002"))
    with pytest.raises(DamagedCheckpoint, match=f"step-00000002 is not signed with the key in {KEY}"):
        read_marker(str(folder.with_name("step-00000002")))
    folder.with_name("step-00000002").rename(folder)
    tree = json.loads((folder / MARKER).read_text())
    tree["state.json"]["sha256"] = "b"
    whole = (folder / MARKER).read_bytes()
    (folder / MARKER).write_text(json.dumps(tree))
    with pytest.raises(DamagedCheckpoint, match="is not signed with the key"):
        read_marker(str(folder))
    (folder / MARKER).write_bytes(whole)
    monkeypatch.setenv(KEY, "two")
    with pytest.raises(DamagedCheckpoint, match="is not signed with the key"):
        read_marker(str(folder))
    (folder / NAME).unlink()
    with pytest.raises(DamagedCheckpoint, match=f"is not signed, and {KEY} is set: unset it only where"):
        read_marker(str(folder))


def test_a_run_goes_on_from_signed_checkpoints_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, heard: pytest.LogCaptureFixture
) -> None:
    data, run_dir = prepared_data(str(tmp_path / "data")), str(tmp_path / "run")
    spec = parse_run(run_tree(data, run_dir, train={"checkpoint_every": 4}, evaluate={"splits": ["valid"]}), "test")
    monkeypatch.setenv(KEY, "one")
    start(spec, stop_after=6)
    assert find_checkpoint(run_dir).step == 6
    assert (Path(folder_of(run_dir, 6)) / NAME).is_file()
    # Whoever has no key, and may write there, makes a marker that fits.
    write = Path(folder_of(run_dir, 6)) / MARKER
    write.write_text(json.dumps(json.loads(write.read_text()), indent=1))
    with heard.at_level(logging.WARNING):
        assert find_checkpoint(run_dir).step == 4
    assert "is not signed with the key" in heard.text
    monkeypatch.setenv(KEY, "two")
    with pytest.raises(InputError, match="has no whole checkpoint left"):
        find_checkpoint(run_dir)
