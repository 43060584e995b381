"""Compile once what every worker would compile at its first start: Python's bytecode."""

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("LOCAL_SIZE", "1")


import ctrsink.export.package
import ctrsink.runtime.ray_train
import ctrsink.serve
import ctrsink.train.loop  # noqa: F401
