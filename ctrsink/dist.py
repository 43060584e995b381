"""Where this process stands among the workers, and the few collectives that the rest of the code needs."""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

PART_ROWS = 1 << 16
"""Rows of a rank that travel to the first one at a time."""


@dataclass(frozen=True)
class Topology:
    """Rank of this process, number of processes, and the device it computes on."""

    rank: int = 0
    world: int = 1
    device: str = "cpu"

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def barrier(topology: Topology) -> None:
    """Wait until every rank is here."""
    if topology.world > 1:
        dist.barrier()


def all_sum(values: list[float] | torch.Tensor, topology: Topology) -> list[float]:
    """Element-wise sums over ranks, in fp64; the host waits for them."""
    return summed(sent(torch.as_tensor(values, dtype=torch.float64), topology), topology).tolist()


def sent(tensor: torch.Tensor, topology: Topology) -> torch.Tensor:
    """A few numbers on their way to the device; the host does not wait until they are there."""
    return tensor.to(topology.device, non_blocking=True)


def summed(tensor: torch.Tensor, topology: Topology) -> torch.Tensor:
    """Element-wise sums over ranks, in place; the host does not wait for them."""
    if topology.world > 1:
        dist.all_reduce(tensor)
    return tensor


def all_max(value: int, topology: Topology) -> int:
    """The largest value of all ranks."""
    tensor = sent(torch.tensor([value]), topology)
    if topology.world > 1:
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return int(tensor)


def gather_rows(rows: np.ndarray, topology: Topology) -> np.ndarray:
    """The float64 rows [n, C] of all ranks one after another; n may differ between ranks."""
    if topology.world == 1:
        return rows
    counts = torch.zeros(topology.world, dtype=torch.int64, device=topology.device)
    counts[topology.rank] = len(rows)
    dist.all_reduce(counts)
    padded = torch.zeros(int(counts.max()), rows.shape[1], dtype=torch.float64, device=topology.device)
    padded[: len(rows)] = torch.from_numpy(rows)
    parts = [torch.empty_like(padded) for _ in range(topology.world)]
    dist.all_gather(parts, padded)
    return np.concatenate([p[: int(n)].cpu().numpy() for p, n in zip(parts, counts, strict=True)])


def gather_parts(part: torch.Tensor, topology: Topology) -> torch.Tensor:
    """The flat parts of all ranks, equally long, one behind another on the device; collective.

    Each rank sends its own in turn: Gloo's gathering of all would make a second copy of the whole.
    """
    size = len(part)
    whole = part.new_empty(size * topology.world, device=topology.device)
    whole[size * topology.rank :][:size].copy_(part)
    if topology.world > 1:
        for rank in range(topology.world):
            dist.broadcast(whole[size * rank :][:size], rank)
    return whole


def gather_first(rows: np.ndarray, topology: Topology) -> np.ndarray | None:
    """The rows [n] of all ranks one after another, bit for bit, on the first rank; None on the others, whose rows it has then.

    Args:
        rows: of any type of fixed size, such as a structured one; n may differ between ranks.
    """
    if topology.world == 1:
        return rows
    counts = torch.zeros(topology.world, dtype=torch.int64, device=topology.device)
    counts[topology.rank] = len(rows)
    dist.all_reduce(counts)
    sizes = counts.tolist()
    raw = torch.from_numpy(np.ascontiguousarray(rows).view(np.uint8).reshape(-1, rows.itemsize))
    found: list[list[np.ndarray]] = [[np.empty(0, np.uint8)] for _ in sizes]
    for start in range(0, max(sizes), PART_ROWS):
        part = torch.zeros(min(PART_ROWS, max(sizes) - start), rows.itemsize, dtype=torch.uint8, device=topology.device)
        own = raw[start : start + len(part)]
        part[: len(own)] = own
        parts = [torch.empty_like(part) for _ in sizes] if topology.is_first else None
        dist.gather(part, parts)
        for held, size, of_rank in zip(found, sizes, parts or (), strict=False):
            held.append(of_rank[: max(0, size - start)].cpu().numpy().reshape(-1))
    return np.concatenate([part for held in found for part in held]).view(rows.dtype) if topology.is_first else None


def from_first(value: dict[str, Any] | None, topology: Topology) -> dict[str, Any]:
    """What the first rank hands in, on every rank: texts and numbers, NaN among them, bit for bit."""
    if topology.world == 1:
        assert value is not None
        return value
    content = json.dumps(value).encode() if topology.is_first else b""
    text = torch.zeros(all_max(len(content), topology), dtype=torch.uint8, device=topology.device)
    text[: len(content)] = torch.tensor(list(content), dtype=torch.uint8)
    dist.broadcast(text, 0)
    return json.loads(bytes(text.tolist()))
