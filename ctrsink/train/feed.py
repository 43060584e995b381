"""Micro-batches on their way to the device: the next one is copied while the present one is computed."""

from collections.abc import Iterator
from functools import lru_cache
from itertools import accumulate

import torch

from ctrsink.sequences.batch import Batch

ALIGNED = 16  # bytes at which each tensor of a batch begins in the memory of all


def fed(batches: list[Batch], device: str) -> Iterator[Batch]:
    """The batches on the device, in their order.

    On CUDA each is copied on a stream of its own, one ahead of what is computed; the computation waits for its batch on the
    device, and the host for nothing.
    """
    if not device.startswith("cuda"):
        yield from (placed(batch, device) for batch in batches)
        return
    copying = _copying(device)

    def ahead(batch: Batch) -> Batch:
        with torch.cuda.stream(copying):
            return placed(batch, device)

    waiting = [ahead(batches[0])]
    for following in [*batches[1:], None]:
        now = waiting.pop()
        computing = torch.cuda.current_stream(device)
        computing.wait_stream(copying)
        # Its memory, which all its tensors lie in, is of the other stream: it must not be given away while this one reads it.
        now.targets.labels.record_stream(computing)
        if following is not None:
            waiting.append(ahead(following))
        yield now


def placed(batch: Batch, device: str) -> Batch:
    """The batch on the device; to a card it goes as one copy, of pinned memory that has its tensors one behind another."""
    if not device.startswith("cuda") or batch.device.type == "cuda":
        return batch.to(device)
    tensors: list[torch.Tensor] = []
    batch.mapped(lambda tensor: (tensors.append(tensor), tensor)[1])
    ends = list(accumulate(tensor.nbytes + -tensor.nbytes % ALIGNED for tensor in tensors))

    def parts(memory: torch.Tensor) -> Iterator[torch.Tensor]:
        for tensor, begin in zip(tensors, [0, *ends], strict=False):
            yield memory[begin : begin + tensor.nbytes].view(tensor.dtype).view(tensor.shape)

    host = _pinned(ends[-1])
    for part, tensor in zip(parts(host), tensors, strict=True):
        part.copy_(tensor)
    there = parts(host.to(device, non_blocking=True))
    return batch.mapped(lambda tensor: next(there))


def _pinned(size: int) -> torch.Tensor:
    """uint8 [size]; torch gives such memory to the next batch when the copy from it is done."""
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)


@lru_cache
def _copying(device: str) -> torch.cuda.Stream:
    """One for the whole run: the allocator keeps memory apart for each stream."""
    return torch.cuda.Stream(device)
