"""What the machines can do and how well they are used: bf16, FLOPs per second over the device's peak, memory of every rank."""

import logging
import re

import numpy as np
import psutil
import torch

from ctrsink.dist import Topology, all_max, gather_rows
from ctrsink.estimate.devices import PEAK_TFLOPS

log = logging.getLogger("ctrsink.train")

SMALL_WORLD = 8
"""Up to so many ranks each has a column of its own in the rows."""


def has_bf16(device: str) -> bool:
    """Whether the device has instructions for products in bfloat16; where it has none, torch computes them far slower than fp32.

    CPUs: AVX-512 BF16 (AMD from Zen 4, Intel Cooper Lake), AMX (Intel from Sapphire Rapids), ARM's bf16. GPUs: from Ampere on.
    """
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if hasattr(torch.cpu, "get_capabilities"):
        return any(name.endswith("bf16") and there is True for name, there in torch.cpu.get_capabilities().items())
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()  # older than that function


def precision_of(wanted: str, kept: str, topology: Topology) -> str:
    """The precision to train in, the same on all ranks; collective. A choice that will be slow is told of.

    Args:
        wanted: `train.precision`.
        kept: what the run began in; empty where it begins now.
    """
    everywhere = not all_max(int(not has_bf16(topology.device)), topology)
    precision = kept or (("bf16" if everywhere else "fp32") if wanted == "auto" else wanted)
    if topology.is_first and wanted == "auto":
        log.info("train.precision auto: %s", precision)
    if topology.is_first and precision == "bf16" and not everywhere:
        log.warning(
            "a worker's %s has no instructions for bf16, in which its products take many times as long as in fp32: "
            "set train.precision to fp32 or auto",
            "GPU" if topology.device.startswith("cuda") else "CPU",
        )
    return precision


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
