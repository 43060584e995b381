"""The portable checkpoint: what is saved comes back, and what is damaged is never loaded."""

import json
import logging
import pickle
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load

from ctrsink import kept, storage
from ctrsink.errors import InputError
from ctrsink.train.checkpoint.checkpoint import (
    FILES,
    MARKER,
    Checkpoint,
    find_checkpoint,
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from ctrsink.train.checkpoint.tensor_file import opened, pieces, to_safetensors
from ctrsink.train.tensors import joined, shapes_of


def make(step: int) -> Checkpoint:
    chance = torch.Generator().manual_seed(step)
    weight = torch.randn(3, 4, generator=chance)
    return Checkpoint(
        step=step,
        position=32 * step,
        parameters={"head.weight": weight, "biases.0.gamma": torch.randn(1, generator=chance)},
        moments={"head.weight/exp_avg": weight * 2, "head.weight/exp_avg_sq": weight**2},
        steps={"head/decay": step},
        dataset="0" * 64,
    )


def same(one: Checkpoint, other: Checkpoint) -> bool:
    pairs = [(one.parameters, other.parameters), (one.moments, other.moments)]
    tensors = all(a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) for a, b in pairs)
    return tensors and (one.step, one.position, one.steps, one.dataset) == (
        other.step,
        other.position,
        other.steps,
        other.dataset,
    )


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    folder = save_checkpoint(str(tmp_path), make(7))
    assert same(load_checkpoint(folder), make(7))
    assert load_checkpoint(folder).parameters["head.weight"].dtype == torch.float32


def test_the_newest_is_taken_also_past_nine_steps(tmp_path: Path) -> None:
    assert latest_checkpoint(str(tmp_path)) is None
    for step in (9, 100, 20):
        save_checkpoint(str(tmp_path), make(step))
    assert [Path(f).name for f in list_checkpoints(str(tmp_path))] == ["step-00000100", "step-00000020", "step-00000009"]
    found = latest_checkpoint(str(tmp_path))
    assert found is not None
    assert same(found, make(100))
    assert same(find_checkpoint(str(tmp_path), 20), make(20))
    with pytest.raises(InputError, match=r"no checkpoint of step 21: choose one of those it has \(9, 20, 100\)"):
        find_checkpoint(str(tmp_path), 21)
    with pytest.raises(InputError, match="holds no whole checkpoint"):
        find_checkpoint(str(tmp_path / "empty"))


def test_what_a_run_tells_of_itself_comes_back(tmp_path: Path) -> None:
    saved = make(7)
    saved.controller, saved.metrics, saved.trained = {"stage": 1, "best": None}, {"auc": 0.7}, {"impressions": 9, "checksum": "a"}
    found = load_checkpoint(save_checkpoint(str(tmp_path), saved))
    assert (found.controller, found.metrics, found.trained, found.native) == (saved.controller, saved.metrics, saved.trained, {})


def test_a_checkpoint_from_before_these_fields_loads(tmp_path: Path) -> None:
    folder = Path(save_checkpoint(str(tmp_path), make(7)))
    state = json.loads((folder / "state.json").read_text())
    content = json.dumps({k: v for k, v in state.items() if k not in ("controller", "metrics", "trained", "native")}).encode()
    (folder / "state.json").write_bytes(content)
    entries = json.loads((folder / MARKER).read_text())
    entries["state.json"] = {"bytes": len(content), "sha256": storage.sha256(content)}
    (folder / MARKER).write_text(json.dumps(entries))
    found = load_checkpoint(str(folder))
    assert same(found, make(7))
    assert (found.controller, found.metrics, found.trained) == ({}, {}, {})


@given(st.dictionaries(st.text(min_size=1).filter(lambda name: name != "__metadata__"), st.lists(st.integers(0, 4), max_size=3)))
def test_the_format_is_that_of_the_library(shapes: dict[str, list[int]]) -> None:
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    content = to_safetensors(tensors)
    found = load(bytes(content))
    assert found.keys() == tensors.keys()
    assert all(found[name].shape == tensors[name].shape and torch.equal(found[name], tensors[name]) for name in tensors)
    transposed = load(bytes(to_safetensors({"t": torch.arange(6.0).view(2, 3).T})))["t"]
    assert torch.equal(transposed, torch.arange(6.0).view(2, 3).T)


@given(st.dictionaries(st.text(min_size=1).filter(lambda name: name != "__metadata__"), st.lists(st.integers(0, 4), max_size=3)))
def test_a_file_is_read_tensor_by_tensor_and_written_so(shapes: dict[str, list[int]]) -> None:
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "some.safetensors"
        path.write_bytes(to_safetensors(tensors))
        found = opened(path)
    assert shapes_of(found) == {name: tensor.shape for name, tensor in tensors.items()}
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)  # of a file that was deleted meanwhile
    assert found.bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert b"".join(map(bytes, pieces(found))) == bytes(to_safetensors(tensors))


def test_later_tensors_take_the_place_of_earlier_ones(tmp_path: Path) -> None:
    one, two = torch.zeros(2), torch.ones(2)
    (tmp_path / "file").write_bytes(to_safetensors({"a": one, "b": one}))
    for earlier in (opened(tmp_path / "file"), {"a": one, "b": one}):
        found = joined(earlier, {"b": two, "c": two})
        assert list(found) == ["a", "b", "c"]
        assert torch.equal(torch.stack([*found.values()]), torch.stack([one, two, two]))


def test_what_another_process_of_the_host_has_checked_is_opened_there(tmp_path: Path) -> None:
    folder = save_checkpoint(str(tmp_path), make(7))
    elsewhere = shutil.copytree(folder, tmp_path / "elsewhere")
    (Path(folder) / "parameters.safetensors").write_bytes(b"")  # it is not looked at again
    assert same(load_checkpoint(folder, checked=elsewhere), make(7))
    with pytest.raises(InputError, match="is not there: give every host its own name"):
        load_checkpoint(folder, checked=tmp_path / "nowhere")


def test_saving_again_replaces(tmp_path: Path) -> None:
    save_checkpoint(str(tmp_path), make(3))
    other = make(4)
    other.step = 3
    folder = save_checkpoint(str(tmp_path), other)
    assert same(load_checkpoint(folder), other)


def damaged(content: bytes, how: str) -> bytes | None:
    match how:
        case "altered":
            return content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]
        case "truncated":
            return content[: len(content) // 2]
        case "empty":
            return b""
        case _:
            return None


@pytest.mark.parametrize("how", ["altered", "truncated", "empty", "missing"])
@pytest.mark.parametrize("name", [*FILES, MARKER])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(
    tmp_path: Path, name: str, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    save_checkpoint(str(tmp_path), make(10))
    newest = Path(save_checkpoint(str(tmp_path), make(20)))
    content = damaged((newest / name).read_bytes(), how)
    if content is None:
        (newest / name).unlink()
    else:
        (newest / name).write_bytes(content)
    with caplog.at_level(logging.WARNING, "ctrsink.train"):
        found = latest_checkpoint(str(tmp_path))
    assert found is not None
    assert same(found, make(10))
    assert len(caplog.records) == 1
    assert f"step-00000020 is {'incomplete' if how == 'missing' else 'damaged'}: " in caplog.text
    assert name in caplog.text or name == MARKER
    with pytest.raises(InputError, match="step-00000020"):
        find_checkpoint(str(tmp_path), 20)


@pytest.mark.parametrize("marker", ["[]", "{}", "3", json.dumps({"state.json": 5}), json.dumps({"state.json": {}})])
def test_a_marker_of_another_kind_is_no_marker(tmp_path: Path, marker: str) -> None:
    folder = Path(save_checkpoint(str(tmp_path), make(1)))
    (folder / MARKER).write_text(marker)
    with pytest.raises(InputError, match=f"is damaged: {MARKER}"):
        load_checkpoint(str(folder))


def test_nothing_whole_is_nothing(tmp_path: Path) -> None:
    folder = Path(save_checkpoint(str(tmp_path), make(1)))
    (folder / MARKER).unlink()
    assert latest_checkpoint(str(tmp_path)) is None


def test_the_marker_lists_every_other_file(tmp_path: Path) -> None:
    folder = Path(save_checkpoint(str(tmp_path), make(1)))
    names = {p.name for p in folder.iterdir()}
    assert names == {*FILES, MARKER}
    entries = kept.opened(json.loads((folder / MARKER).read_text()), MARKER)
    assert {name: entry["bytes"] for name, entry in entries.items()} == {name: (folder / name).stat().st_size for name in FILES}


def test_a_checkpoint_holds_no_pickle_and_loads_none(tmp_path: Path) -> None:
    folder = Path(save_checkpoint(str(tmp_path), make(1)))
    for path in folder.iterdir():
        assert not path.read_bytes().startswith((b"\x80", b"PK"))
    payload = pickle.dumps(make(1).parameters)
    (folder / "parameters.safetensors").write_bytes(payload)
    with pytest.raises(InputError, match=r"parameters\.safetensors does not match its hash"):
        load_checkpoint(str(folder))


def test_an_outage_is_no_damage_and_lost_checkpoints_are_not_forgotten(tmp_path: Path) -> None:
    """A run must never start anew because its checkpoints could not be read."""
    folder = save_checkpoint(str(tmp_path), make(3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "read_bytes", _outage)
        with pytest.raises(InputError, match="cannot reach"):
            latest_checkpoint(str(tmp_path))
    path = Path(folder) / "parameters.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match="no whole checkpoint left"):
        latest_checkpoint(str(tmp_path))
    (Path(folder) / "complete.json").unlink()
    assert latest_checkpoint(str(tmp_path)) is None


def _outage(uri: str) -> bytes:
    raise InputError(f"{uri}: cannot reach the S3 endpoint")
