"""Where a report was written, and with what."""

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ctrsink import __version__
from ctrsink.report.page import Note, Section, Table

PACKAGES = ("torch", "transformers", "peft", "numpy", "pyarrow", "ray", "deepspeed", "matplotlib")


def environment_section() -> Section:
    """Versions and machine of this process; a run's folder does not keep those of its training."""
    rows = [("ctrsink", __version__), ("Python", platform.python_version())]
    for name in PACKAGES:
        try:
            rows.append((name, version(name)))
        except PackageNotFoundError:
            rows.append((name, "not installed"))
    rows += [("system", platform.system()), ("processor", _processor()), ("cores", str(os.cpu_count()))]
    told = Note("Of the process that wrote this page. A run's folder does not keep the machine and the versions that trained it.")
    return Section("Environment", [told, Table(("", ""), rows, left=2)])


def written() -> str:
    """When a page is written, and by what; for its foot."""
    now = datetime.now(UTC)
    return f"Written {now:%d %B %Y, %H:%M} UTC by ctrsink {__version__}. Nothing in this page is loaded from elsewhere."


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
