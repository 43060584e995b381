"""One global batch, whatever shares it out: ZeRO 0 to 3, accumulation 1 and 4, one process and two give the same loss curve."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ctrsink.train.observe.telemetry import read_metrics
from tests.runs import prepared_data
from tests.scale_ranks import CASES

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder of all sixteen runs, and what the first rank of each said."""
    folder = tmp_path_factory.mktemp("scale")
    data = prepared_data(str(folder / "data"))
    lines = []
    for world in (1, 2):
        command = [sys.executable, "-m", "tests.scale_ranks"]
        arguments = [str(world), str(folder / f"meet-{world}"), data, str(folder)]
        ranks = [
            subprocess.Popen(
                [*command, str(rank), *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ
            )
            for rank in range(world)
        ]
        done = [rank.communicate(timeout=500) for rank in ranks]
        assert [rank.returncode for rank in ranks] == [0] * world, done
        lines += [json.loads(line) for line in done[0][0].splitlines() if line.startswith("{")]
    return folder, lines


@pytest.mark.timeout(1200)
def test_loss_curves_do_not_depend_on_world_zero_stage_and_accumulation(ran: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, lines = ran
    assert len(lines) == 2 * len(CASES)
    assert all(line["finished"] for line in lines)
    assert len({line["checksum"] for line in lines}) == 1
    curves = {
        (world, *case): [row["loss"] for row in read_metrics(f"{folder}/world{world}-zero{case[0]}-accumulation{case[1]}")]
        for world in (1, 2)
        for case in CASES
    }
    reference = curves[1, 0, 1]
    assert len(reference) == 20
    for case, curve in curves.items():
        torch.testing.assert_close(curve, reference, atol=1e-5, rtol=0, msg=f"{case}: {curve} and {reference}")


def test_a_stage_leaves_what_is_frozen_as_it_was_bit_for_bit(ran: tuple[Path, list[dict[str, Any]]]) -> None:
    assert all(line["frozen_unchanged"] for line in ran[1])
