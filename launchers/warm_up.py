"""Compile once what every worker would compile at its first start: Python's bytecode and DeepSpeed's operator for CPUs."""

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("LOCAL_SIZE", "1")

import matplotlib.pyplot  # noqa: F401
import torch.utils.tensorboard  # noqa: F401
from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

import ctrsink.export.package
import ctrsink.runtime.ray_train
import ctrsink.serve
import ctrsink.train.loop  # noqa: F401

if __name__ == "__main__":
    ShareMemCommBuilder().load(verbose=False)
