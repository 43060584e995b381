"""How a Ray node is started from the command line: its arguments, its environment, and when it is ready."""

import json
import os
import sys
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RAY = (sys.executable, "-m", "ray.scripts.scripts")
"""The `ray` of this Python."""


def command(address: str, cpus: int, *flags: str) -> list[str]:
    """`ray start --block` of a node at `address`.

    Give it a `--temp-dir` of its own with a short path: that of a Unix socket has about 100 bytes at most, and Ray adds 60.
    """
    return [
        *(*RAY, "start", "--block", "--disable-usage-stats"),
        *(f"--node-ip-address={address}", f"--num-cpus={cpus}", "--num-gpus=0", *flags),
    ]


def credentials(token_file: Path) -> dict[str, str]:
    """What a node or a client needs in its environment; without it the cluster refuses it."""
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token_file)}


def write_token(file: Path, token: str) -> None:
    """Write the cluster's token so that nobody else can read it."""
    file.touch(mode=0o600)
    file.write_text(token)


def environment(token_file: Path, base: Mapping[str, str]) -> dict[str, str]:
    """The environment of a node and so of its workers: `base` without what it says of Ray, and `python` is this one."""
    return {
        **{name: value for name, value in base.items() if not name.startswith("RAY_")},
        **credentials(token_file),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{base.get('PATH', os.defpath)}",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_memory_monitor_refresh_ms": "0",  # another program's memory is no reason to kill a worker
    }


def ask(url: str, token: str) -> Any:
    """The JSON that a job server answers; no proxy is asked. Raises OSError where it does not answer, or refuses."""
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=5) as response:
        return json.load(response)


def answers(url: str, token: str) -> bool:
    """Whether the job server at `url` takes jobs."""
    try:
        ask(f"{url}/api/jobs/", token)
    except OSError:
        return False
    return True
