"""Ranks as processes of their own: what each printed, or the errors of the first that failed."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def run_ranks(program: list[str], world: int, arguments: list[str], folder: Path, timeout: float) -> list[list[dict[str, Any]]]:
    """The JSON objects that each rank printed, a line each.

    Args:
        program: of Python, such as `-m` and a module; the rank is its first argument.
        arguments: the others.
        folder: where the program runs.
        timeout: seconds for each rank.
    """
    ranks = [
        subprocess.Popen(
            [sys.executable, *program, str(rank), *arguments],
            cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(world)
    ]  # fmt: skip
    try:
        printed = []
        for process in ranks:
            out, errors = process.communicate(timeout=timeout)
            assert process.returncode == 0, errors
            printed.append([json.loads(line) for line in out.splitlines() if line.startswith("{")])
        return printed
    finally:
        for process in ranks:
            process.kill()
