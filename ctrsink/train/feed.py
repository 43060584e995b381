"""Micro-batches on their way to the device: the next one is copied while the present one is computed."""

from collections.abc import Iterator
from functools import lru_cache

import torch

from ctrsink.sequences.batch import Batch


def fed(batches: list[Batch], device: str) -> Iterator[Batch]:
    """The batches on the device, in their order.

    On CUDA each is pinned and copied on a stream of its own, one ahead of what is computed; the computation waits for its batch
    on the device, and the host for nothing.
    """
    if not device.startswith("cuda"):
        yield from (batch.to(device) for batch in batches)
        return
    copying = _copying(device)

    def sent(batch: Batch) -> Batch:
        with torch.cuda.stream(copying):
            return batch.mapped(torch.Tensor.pin_memory).to(device)

    waiting = [sent(batches[0])]
    for following in [*batches[1:], None]:
        now = waiting.pop()
        computing = torch.cuda.current_stream(device)
        computing.wait_stream(copying)
        # Its memory is of the other stream: it must not be given away while this one reads it.
        now.mapped(lambda tensor, stream=computing: _used(tensor, stream))
        if following is not None:
            waiting.append(sent(following))
        yield now


@lru_cache
def _copying(device: str) -> torch.cuda.Stream:
    """One for the whole run: the allocator keeps memory apart for each stream."""
    return torch.cuda.Stream(device)


def _used(tensor: torch.Tensor, stream: torch.cuda.Stream) -> torch.Tensor:
    tensor.record_stream(stream)
    return tensor
