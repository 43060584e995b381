"""bfloat16 where the hardware has it: what is chosen, what is told, and that a run keeps what it began in."""

from pathlib import Path

import pytest
import torch

from ctrsink.config import parse_run
from ctrsink.dist import Topology
from ctrsink.runtime.start import start
from ctrsink.train.checkpoint.checkpoint import find_checkpoint
from ctrsink.train.observe import hardware
from ctrsink.train.observe.hardware import has_bf16, precision_of
from ctrsink.train.restore import restore_run
from tests.runs import prepared_data, run_tree

SLOW = "a worker's CPU has no instructions for bf16, in which its products take many times as long as in fp32"

pytestmark = pytest.mark.usefixtures("heard")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return prepared_data(str(tmp_path_factory.mktemp("bf16") / "set"))


@pytest.mark.parametrize(
    ("there", "found"),
    [
        ({"architecture": "x86_64", "avx2": True, "avx512_bf16": False, "amx_bf16": False}, False),
        ({"architecture": "x86_64", "avx512_f": True, "avx512_vnni": True, "avx512_bf16": False}, False),
        ({"architecture": "x86_64", "avx512_bf16": True, "amx_bf16": False}, True),
        ({"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": True}, True),
        ({"architecture": "aarch64", "neon": True, "bf16": True}, True),
        ({"architecture": "aarch64", "neon": True, "bf16": False}, False),
    ],
)
def test_a_cpu_is_asked_for_its_instructions(there: dict[str, object], found: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: there, raising=False)
    assert has_bf16("cpu") == found


@pytest.mark.parametrize(("avx", "amx"), [(False, False), (True, False), (False, True)])
def test_an_older_torch_is_asked_in_its_own_way(avx: bool, amx: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert has_bf16("cpu") == (avx or amx)


@pytest.mark.parametrize(
    ("wanted", "kept", "there", "taken", "slow"),
    [
        ("fp32", "", False, "fp32", False),
        ("bf16", "", True, "bf16", False),
        ("bf16", "", False, "bf16", True),
        ("auto", "", True, "bf16", False),
        ("auto", "", False, "fp32", False),
        ("auto", "bf16", False, "bf16", True),
        ("auto", "fp32", True, "fp32", False),
    ],
)
def test_what_is_taken_and_what_is_told(
    wanted: str, kept: str, there: bool, taken: str, slow: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(hardware, "has_bf16", lambda device: there)
    assert precision_of(wanted, kept, Topology()) == taken
    assert (SLOW in caplog.text) == slow
    assert (f"train.precision auto: {taken}" in caplog.text) == (wanted == "auto")


def test_a_run_keeps_the_precision_that_it_began_in(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    spec = parse_run(run_tree(data, str(tmp_path / "run"), train={"precision": "auto"}), "test")
    monkeypatch.setattr(hardware, "has_bf16", lambda device: True)
    start(spec, stop_after=2)
    assert find_checkpoint(spec.run_dir).precision == "bf16"
    monkeypatch.setattr(hardware, "has_bf16", lambda device: False)
    start(spec, resume=True, stop_after=1)
    assert find_checkpoint(spec.run_dir).precision == "bf16"
    assert SLOW in caplog.text
    # Frozen weights are those that the run was trained with, rounded.
    frozen = restore_run(spec.run_dir).model.backbone.embed_tokens.weight
    assert torch.equal(frozen, frozen.bfloat16().float())


@pytest.mark.parametrize("tf32", [True, False])
def test_tf32_is_used_where_it_is_asked_for(data: str, tmp_path: Path, tf32: bool) -> None:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = not tf32
    try:
        start(parse_run(run_tree(data, str(tmp_path / "run"), train={"tf32": tf32}), "test"), stop_after=1)
        assert torch.backends.cuda.matmul.allow_tf32 is tf32
    finally:  # no monkeypatch: it would take the setting away
        torch.backends.cuda.matmul.allow_tf32 = before
