"""DeepSpeed without what it brings along: MLflow for a tuner that nobody calls, a compiler at run time, a chatty log."""

import logging
import os
import sys

_NO_MLFLOW = "mlflow" not in sys.modules
if _NO_MLFLOW:
    # Its import takes most of a second of every worker's start. What is None here counts as not installed.
    sys.modules["mlflow"] = None  # pyright: ignore[reportArgumentType]
try:
    import deepspeed
    from deepspeed.runtime.utils import combine_grad_norm_groups
    from deepspeed.utils import groups, safe_get_full_fp32_param, safe_get_full_optimizer_state, safe_set_full_fp32_param
    from deepspeed.utils.tensor_fragment import (
        safe_get_local_fp32_param,
        safe_get_local_optimizer_state,
        safe_set_full_optimizer_state,
        safe_set_local_fp32_param,
        safe_set_local_optimizer_state,
    )
finally:
    if _NO_MLFLOW:
        del sys.modules["mlflow"]

# DeepSpeed compiles an all-reduce of its own for CPUs, for inference only, under a file lock: a worker killed there would make
# every later run on the host wait for ever. Where no compiled operator is known it neither compiles nor waits.
deepspeed.ops.__compatible_ops__ = {}  # pyright: ignore[reportAttributeAccessIssue]
logging.getLogger("DeepSpeed").setLevel(os.environ.get("DEEPSPEED_LOG_LEVEL", "WARNING"))

__all__ = [
    "combine_grad_norm_groups",
    "deepspeed",
    "groups",
    "safe_get_full_fp32_param",
    "safe_get_full_optimizer_state",
    "safe_get_local_fp32_param",
    "safe_get_local_optimizer_state",
    "safe_set_full_fp32_param",
    "safe_set_full_optimizer_state",
    "safe_set_local_fp32_param",
    "safe_set_local_optimizer_state",
]
