"""Rows of tensors travel to other ranks, and answers come back the same way."""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from ctrsink.dist import Topology


@dataclass(frozen=True)
class Route:
    """How many rows go from this rank to each rank, and come from each; every method is collective."""

    sent: list[int]
    received: list[int]

    @classmethod
    def of(cls, sent: list[int], topology: Topology) -> "Route":
        """Collective: each rank says how many it sends to each."""
        if topology.world == 1:
            return cls(sent, sent)
        counts = torch.tensor(sent, device=topology.device)
        received = torch.empty_like(counts)
        dist.all_to_all_single(received, counts)
        return cls(sent, received.tolist())

    def there(self, tensor: torch.Tensor) -> torch.Tensor:
        """[sum of sent, ...], by the rank that each row goes to -> [sum of received, ...], by the rank that it is from."""
        return _moved(tensor, self.sent, self.received)

    def back(self, tensor: torch.Tensor) -> torch.Tensor:
        """The other way: [sum of received, ...] -> [sum of sent, ...]."""
        return _moved(tensor, self.received, self.sent)


def _moved(tensor: torch.Tensor, sent: list[int], received: list[int]) -> torch.Tensor:
    if len(sent) == 1:
        return tensor
    out = tensor.new_empty(sum(received), *tensor.shape[1:])
    dist.all_to_all_single(out, tensor.contiguous(), received, sent)
    return out
