"""The command line as a user meets it: an exit code, what stands on stdout, what stands on stderr."""

import contextlib
import hashlib
import io
import json
import logging
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctrsink.cli import main


@dataclass(frozen=True)
class Result:
    """What one call left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The last line of stdout, which is one JSON object and has no NaN in it."""
        tree = json.loads(self.out.splitlines()[-1], parse_constant=lambda name: int(f"{name} is no JSON"))
        assert isinstance(tree, dict)
        return tree


def call(*args: object) -> Result:
    """`ctrsink ARGS` in this process: importing torch again would take seconds each time."""
    # Not pytest's own capture: a handler that DeepSpeed makes now goes on writing to these when the test is over.
    out, err = io.StringIO(), io.StringIO()
    logger = logging.getLogger("ctrsink")
    before = logger.handlers[:], logger.level, logger.propagate
    logger.handlers = []
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main([str(arg) for arg in args])
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        logger.handlers, logger.level, logger.propagate = before
    return Result(code, out.getvalue(), err.getvalue())


def call_process(*args: object) -> Result:
    """`python -m ctrsink ARGS` in a process of its own."""
    command = [sys.executable, "-m", "ctrsink", *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ)
    return Result(done.returncode, done.stdout, done.stderr)


def good(*args: object) -> dict[str, Any]:
    """The JSON object of a call that must succeed."""
    result = call(*args, "--json")
    assert result.code == 0, result.err
    return result.json


def refused(result: Result, *parts: str) -> str:
    """Check that `result` is bad input told in one line that holds every one of `parts`; returns that line."""
    assert result.code == 2, result.err
    assert "Traceback" not in result.out + result.err
    lines = [line for line in result.err.splitlines() if "error:" in line]
    assert lines == result.err.splitlines()[-1:], result.err
    assert lines[0].startswith("error: ")
    for part in parts:
        assert part in lines[0]
    return lines[0]


def content(folder: Path) -> dict[str, str]:
    """Every file below `folder` by its hash: equal when nothing was written, changed or removed."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
