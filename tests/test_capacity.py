"""`micro_batch_tokens: auto`: a plan's estimate of what fits, and half of it as long as it does not."""

from pathlib import Path
from typing import Any

import pytest
import torch

from ctrsink.config import parse_run
from ctrsink.dist import Topology
from ctrsink.estimate.activations import Activations
from ctrsink.estimate.budget import SHARE, tokens_within
from ctrsink.runtime.start import start
from ctrsink.train.capacity import halved
from tests.runs import prepared_data, run_tree

ALONE = Topology()


def test_gradients_and_what_a_step_needs_are_reserved() -> None:
    line = Activations(1000.0, 10.0)
    assert tokens_within(line, 100_000) == int((SHARE * 100_000 - 1000) / 10)
    assert tokens_within(line, 100_000, reserved=60_000) == int((SHARE * 40_000 - 1000) / 10)
    assert tokens_within(line, 100_000, reserved=100_000) == 0
    assert tokens_within(line, 100_000, reserved=60_000, given=3000) == 200  # the run says what activations may fill


def test_what_does_not_fit_is_halved_until_it_does(heard: Any) -> None:
    tried = []

    def compute(tokens: int) -> None:
        tried.append(tokens)
        if tokens > 300:
            raise torch.OutOfMemoryError("of this test")

    assert halved(1000, compute, ALONE) == 250
    assert tried == [1000, 500, 250]
    assert sum("does not fit into the memory of every worker" in record.message for record in heard.records) == 2


def test_other_errors_of_the_first_pass_are_told() -> None:
    def compute(tokens: int) -> None:
        raise ValueError("of this test")

    with pytest.raises(ValueError, match="of this test"):
        halved(8, compute, ALONE)


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_a_run_takes_what_fits(zero_stage: int, tmp_path: Path, heard: Any) -> None:
    data = prepared_data(str(tmp_path / "data"))
    train = {"micro_batch_tokens": "auto", "memory_gib": 0.004, "zero_stage": zero_stage}
    spec = parse_run(run_tree(data, str(tmp_path / "run"), train=train), "test")
    assert start(spec, stop_after=9)["steps"] == 9
    found = [record.message for record in heard.records if "tokens fit into the memory" in record.message]
    tokens = [int(message.split()[2]) for message in found]
    assert len(tokens) == 2  # of each stage
    assert all(100 < count < 3000 for count in tokens)
