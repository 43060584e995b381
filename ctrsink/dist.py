"""Where this process stands among the workers, and the few collectives that the rest of the code needs."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist


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
