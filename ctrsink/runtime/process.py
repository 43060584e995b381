"""What a process sets before Ray, DeepSpeed and torch look at its environment."""

import gc
import logging
import os

from ctrsink import logs


def prepare_process(device: str, threads: int, rank: int = 0, deterministic: bool = False) -> None:
    """Accelerator, threads, logging and garbage collection of this process; call it before DeepSpeed is imported.

    `deterministic` is that of `runtime`; cuBLAS reads its workspace when it is first used.

    Threads are cores / workers of the host: with more, OpenMP's spinning makes training many times slower. Imports make millions
    of objects and free none, so looking every 700 new ones for garbage costs a tenth of the start, and of every restart.
    """
    gc.set_threshold(10_000)
    os.environ["DS_ACCELERATOR"] = device
    os.environ["LOCAL_SIZE"] = os.environ.get("LOCAL_WORLD_SIZE", "1")
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # the one of the two that torch allows and that is not slow
    import torch

    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)
    logs.configure(logging.INFO if rank == 0 else logging.WARNING, rank)


def stay_on_loopback(address: str | None) -> None:
    """Let a Ray cluster of our own listen on loopback alone; call it before Ray is imported, which reads this then.

    Nothing is set where a cluster at `address`, or that of a Ray job, is joined.
    """
    if not (address or os.environ.get("RAY_ADDRESS")):
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
