"""What a training process sets before DeepSpeed and torch look at its environment."""

import logging
import os

from ctrsink import logs


def prepare_process(device: str, threads: int, rank: int = 0) -> None:
    """Accelerator, threads and logging of this process; call it before DeepSpeed is imported.

    Threads are cores / workers of the host: with more, OpenMP's spinning makes training many times slower.
    """
    os.environ["DS_ACCELERATOR"] = device
    os.environ["LOCAL_SIZE"] = os.environ.get("LOCAL_WORLD_SIZE", "1")
    os.environ["OMP_NUM_THREADS"] = str(threads)
    import torch

    torch.set_num_threads(threads)
    logs.configure(logging.INFO if rank == 0 else logging.WARNING, rank)
