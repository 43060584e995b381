"""What only a CUDA device can show: the same run as on the CPU, within the tolerance of its arithmetic."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ctrsink.train.telemetry import read_metrics
from tests.runs import prepared_data, run_tree

PLAIN: dict[str, Any] = {"model": {"backbone": {"config": {"attention_dropout": 0.0}}}}


def losses(tree: dict[str, Any], folder: Path) -> list[float]:
    """Train in a process of its own: a process keeps the accelerator that DeepSpeed chose first."""
    path = folder / f"{Path(tree['run_dir']).name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    subprocess.run([sys.executable, "-m", "ctrsink", "train", "--config", str(path)], check=True)
    return [row["loss"] for row in read_metrics(tree["run_dir"])]


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-3), ("bf16", 0.05)])
def test_losses_on_cuda_are_those_of_the_cpu(tmp_path: Path, precision: str, tolerance: float) -> None:
    data = prepared_data(str(tmp_path / "data"))
    cuda = {"runtime": {"kind": "local", "device": "cuda"}, "train": {"precision": precision}}
    found = losses(run_tree(data, str(tmp_path / "cuda"), **PLAIN, **cuda), tmp_path)
    expected = losses(run_tree(data, str(tmp_path / "cpu"), **PLAIN), tmp_path)
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)
