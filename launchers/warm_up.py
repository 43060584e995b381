"""Compile once what every process would compile at its first start, or at every start: Python's bytecode.

Many images set PYTHONDONTWRITEBYTECODE. There each worker of each run, and each restart after a failure, would compile six
thousand modules again, which doubles the time that it takes to start. So the bytecode is written here, whatever is set.
"""

import compileall
import importlib
import os
import sys
from contextlib import suppress
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("LOCAL_SIZE", "1")
MODULES = ["ctrsink.cli", "ctrsink.export.package", "ctrsink.runtime.ray_train", "ctrsink.serve", "ctrsink.train.loop"]
RAY_PROCESSES = ["dashboard", "_private"]  # of Ray's own, which nothing here imports


def main() -> None:
    """Import what a run imports, and compile all of it that is not."""
    for name in MODULES:
        importlib.import_module(name)
    with suppress(ImportError):
        importlib.import_module("mlflow")
    for source in [Path(getattr(module, "__file__", None) or "") for module in sys.modules.values()]:
        if source.suffix == ".py" and source.is_file():  # torch.ops names a file that is none
            compileall.compile_file(source, quiet=2)  # nothing where there is bytecode of its present time stamp
    ray = Path(sys.modules["ray"].__path__[0])
    for folder in RAY_PROCESSES:
        compileall.compile_dir(ray / folder, quiet=2)


if __name__ == "__main__":
    main()
