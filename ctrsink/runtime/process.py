"""What a training process sets before DeepSpeed and torch look at its environment."""

import logging
import os
import sys


def prepare_process(device: str, threads: int, rank: int = 0) -> None:
    """Accelerator, threads and logging of this process; call it before DeepSpeed is imported.

    Threads are cores / workers of the host: with more, OpenMP's spinning makes training many times slower.
    """
    os.environ["DS_ACCELERATOR"] = device
    os.environ["LOCAL_SIZE"] = os.environ.get("LOCAL_WORLD_SIZE", "1")
    os.environ["OMP_NUM_THREADS"] = str(threads)
    import torch

    torch.set_num_threads(threads)
    configure_logging(logging.INFO if rank == 0 else logging.WARNING)


def configure_logging(level: int = logging.INFO) -> None:
    """Our messages go to stderr, one line each; stdout is left to results."""
    logger = logging.getLogger("ctrsink")
    logger.setLevel(level)
    logger.propagate = False
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
        logger.addHandler(handler)
