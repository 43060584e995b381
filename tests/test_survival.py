"""Real workers killed on a real Ray: the run ends, exactly as the one that was left alone."""

import argparse
import random
from pathlib import Path

import pytest

from benchmarks.survival import elastic_run, good, killed_runs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def test_a_killed_worker_changes_nothing(tmp_path: Path) -> None:
    args = argparse.Namespace(events=5000, seed=random.randrange(1000), runs=1, steps=150)
    (row,) = killed_runs(args, tmp_path)
    assert good(row)
    assert row.bitwise


def test_workers_go_and_come_back(tmp_path: Path) -> None:
    (row,) = elastic_run(argparse.Namespace(events=5000, seed=0, steps=600, rate=0.0001), tmp_path)
    assert good(row)
    assert row.worlds == [2, 1, 2]
    assert row.last_loss_off is not None
