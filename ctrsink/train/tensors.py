"""Tensors by name, each made when it is asked for: together they may be more than a process can hold."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Source:
    """Where a tensor comes from."""

    shape: torch.Size
    make: Callable[[], torch.Tensor]
    """Makes the tensor, on the CPU; where ranks hold parts of it, collective."""
    dtype: torch.dtype = torch.float32


class Tensors(Mapping[str, torch.Tensor]):
    """Tensors by name; nothing that was made is kept.

    Where ranks hold parts, every rank asks for the same ones in the same order.
    """

    def __init__(self, sources: Mapping[str, Source]) -> None:
        self.sources = dict(sources)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.sources[name].make()

    def __iter__(self) -> Iterator[str]:
        return iter(self.sources)

    def __len__(self) -> int:
        return len(self.sources)

    def __contains__(self, name: object) -> bool:
        return name in self.sources

    @property
    def bytes(self) -> int:
        """Of all of them."""
        return sum(source.dtype.itemsize * source.shape.numel() for source in self.sources.values())


def joined(earlier: Mapping[str, torch.Tensor], later: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """Both, the later one where both have a name; a dict of two dicts, and else `Tensors`, of which nothing is made here."""
    if isinstance(earlier, Tensors) or isinstance(later, Tensors):
        return Tensors(_sources(earlier) | _sources(later))
    return {**earlier, **later}


def renamed(tensors: Mapping[str, torch.Tensor], now: Callable[[str], str]) -> Tensors:
    """The same under other names; nothing is made."""
    return Tensors({now(name): source for name, source in _sources(tensors).items()})


def shapes_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Size]:
    """Their shapes; nothing is made."""
    return {name: source.shape for name, source in _sources(tensors).items()}


def in_memory(tensors: Mapping[str, torch.Tensor], wanted: bool) -> dict[str, torch.Tensor]:
    """All of them at once; none where this rank does not want them, although it takes part in their making."""
    found = {}
    for name, tensor in tensors.items():
        if wanted:
            found[name] = tensor
    return found


def _sources(tensors: Mapping[str, torch.Tensor]) -> dict[str, Source]:
    if isinstance(tensors, Tensors):
        return tensors.sources
    return {name: Source(tensor.shape, lambda tensor=tensor: tensor, tensor.dtype) for name, tensor in tensors.items()}
