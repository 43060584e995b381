"""One rank of two fails or hangs: it is named with step, stage and shards, the other one ends too, the checkpoint stays."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ctrsink.config.train import RuntimeSpec, WorkersSpec
from ctrsink.runtime.ray_train import placing
from ctrsink.train.checkpoint.checkpoint import find_checkpoint
from tests.runs import prepared_data


@pytest.mark.slow
@pytest.mark.parametrize("failure", ["raise", "hang"])
def test_the_rank_that_failed_is_named_and_the_other_one_does_not_wait_for_ever(tmp_path: Path, failure: str) -> None:
    data = prepared_data(str(tmp_path / "data"))
    arguments = [str(tmp_path / "meet"), data, str(tmp_path / "run")]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.failing_ranks", failure, str(rank), *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ,
        )
        for rank in range(2)
    ]  # fmt: skip
    printed = [rank.communicate(timeout=150) for rank in ranks]
    lost, failed = ([line for line in out.splitlines() if "rank" in line] for out, _ in printed)
    assert len(failed) == 1, printed
    assert failed[0].startswith("RunError: rank 1, step 13, stage all, shards/")
    assert failed[0].endswith("ZeroDivisionError: nothing to divide by")
    assert len(lost) == 1, printed
    assert lost[0].startswith("PeerLost: rank 0, step 13, stage all, shards/")
    assert find_checkpoint(str(tmp_path / "run")).step == 12


def test_elastic_workers_are_placed_again_soon_and_a_fixed_number_waits() -> None:
    """Ray believes a lost node alive for some seconds: who may do with less must not wait long for it."""
    fixed = RuntimeSpec(kind="ray", workers=2, start_timeout_s=600)
    assert placing(fixed) == (600, 0)
    assert placing(fixed.model_copy(update={"max_failures": 3})) == (600, 40)
    elastic = RuntimeSpec(kind="ray", workers=WorkersSpec(min=1, max=2), start_timeout_s=600, max_failures=3)
    assert placing(elastic) == (15, 40)
    assert placing(elastic.model_copy(update={"max_failures": -1})) == (15, -1)
    assert placing(elastic.model_copy(update={"start_timeout_s": 5.0})) == (5, 1)
