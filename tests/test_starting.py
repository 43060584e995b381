"""What answers without a model answers at once."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def processor_seconds(*args: str) -> float:
    """What `ctrsink ARGS` takes of a processor, in a process of its own; other work on the machine does not count."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "ctrsink", *args], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize(("args", "limit"), [(["--help"], 0.3), (["config", "show", "configs/ctr-sink.yaml"], 1.0)], ids=str)
def test_help_and_a_configuration_are_shown_at_once(args: list[str], limit: float) -> None:
    # The first start of a version compiles its modules.
    assert min(processor_seconds(*args) for _ in range(3)) < limit
