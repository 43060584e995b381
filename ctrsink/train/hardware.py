"""How well the machines are used: FLOPs per second over the device's peak, and memory of every rank."""

import re

import numpy as np
import psutil
import torch

from ctrsink.dist import Topology, gather_rows

# Dense bf16 products with fp32 accumulation, in TFLOP/s, from the makers' data sheets; the first name that fits counts.
PEAK_TFLOPS = {
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H200": 989.0,
    "GH200": 989.0,
    "B200": 2250.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
}
SMALL_WORLD = 8
"""Up to so many ranks each has a column of its own in the rows."""


def known_peak(name: str) -> float | None:
    """TFLOP/s of a GPU called `name` by its driver; None: not known, or a slice of one (MIG)."""
    if "MIG" in name.split():
        return None
    return next((peak for part, peak in PEAK_TFLOPS.items() if re.search(rf"\b{re.escape(part)}\b", name)), None)


def peak_of(device: str, given: float | None) -> float | None:
    """TFLOP/s that the device could do: `given` (`runtime.peak_tflops`), or that of a known GPU; None on a CPU."""
    if given is not None or not device.startswith("cuda"):
        return given
    return known_peak(torch.cuda.get_device_name(device))


def memory_gib(device: str) -> list[float]:
    """GiB of this process: resident, and most that CUDA had allocated since the last call (NaN without CUDA)."""
    resident = psutil.Process().memory_info().rss / 2**30
    if not device.startswith("cuda"):
        return [resident, float("nan")]
    peak = torch.cuda.max_memory_allocated(device) / 2**30
    torch.cuda.reset_peak_memory_stats(device)
    return [resident, peak]


def over_ranks(pace: dict[str, float], peak: float | None, topology: Topology) -> dict[str, float]:
    """The figures of a row to which every rank adds something; collective.

    Args:
        pace: this rank's, see `Pace.report`; its `tokens_per_s` and `tflops` are summed, its `data_wait` is the longest of all.
        peak: TFLOP/s of one device.
    """
    own = [pace["tokens_per_s"], pace["tflops"], pace["data_wait"], *memory_gib(topology.device)]
    ranks = gather_rows(np.array([own]), topology)
    tokens, tflops = ranks[:, 0].sum(), ranks[:, 1].sum()
    row = {**pace, "tokens_per_s": float(tokens), "tflops": float(tflops), "data_wait": float(ranks[:, 2].max())}
    if peak is not None:
        row["mfu"] = float(tflops) / (peak * topology.world)
    for name, column in (("memory_gib", ranks[:, 3]), ("gpu_memory_gib", ranks[:, 4])):
        if not np.isnan(column).any():
            row |= _per_rank(name, column)
    return row


def _per_rank(name: str, column: np.ndarray) -> dict[str, float]:
    """A key per rank in a small world; of a large one the largest alone, so that rows stay short."""
    if len(column) > SMALL_WORLD:
        return {f"{name}/max": float(column.max())}
    return {f"{name}/rank{rank}": float(value) for rank, value in enumerate(column)}
