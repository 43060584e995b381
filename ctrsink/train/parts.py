"""A model is built while each process holds its share of every tensor, and whole only what is worked on at the moment."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ctrsink.dist import Topology

LEAST = 4096  # bytes: what is smaller stays whole
OVERWRITES = frozenset({"aten::normal_", "aten::uniform_", "aten::zero_", "aten::fill_"})
LOOK_AWAY = frozenset({"aten::detach", "aten::alias"})
"""Operations that neither read a value nor ask how large a storage is."""
MIB = 2**20


@dataclass
class _Emptied:
    """A storage that holds nothing at the moment."""

    of: StorageWeakRef
    bytes: int
    part: torch.Tensor
    """This rank's share, uint8; fewer or none of the last ranks."""


class InParts(TorchDispatchMode):
    """Inside it the storage of a tensor is emptied when the next one is worked on, and filled when it is needed again.

    Collective: every rank makes the same tensors with the same values, on the CPU. The operations and their order are those of a
    build without it, and so are the values, to the bit. What is left at the end is to be filled. What was there before stays.
    """

    def __init__(self, topology: Topology) -> None:
        super().__init__()
        self._topology = topology
        self._emptied: dict[int, _Emptied] = {}
        self._whole: dict[int, StorageWeakRef] = {}
        """What the last operation worked on, of what was made in here."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        if name in LOOK_AWAY:
            return func(*args, **kwargs)
        used = self._storages((args, kwargs))
        for key in [key for key in self._whole if key not in used]:  # in an order that all ranks have
            self._empty(self._whole.pop(key))
        for key in [key for key in used if key in self._emptied]:
            self._fill(key, used[key], name in OVERWRITES and _spans(args[0], self._emptied[key].bytes))
            self._whole[key] = StorageWeakRef(used[key])
        found = func(*args, **kwargs)
        made = {key: storage for key, storage in self._storages(found).items() if key not in used and storage.nbytes() >= LEAST}
        self._whole |= {key: StorageWeakRef(storage) for key, storage in made.items()}
        return found

    def fill(self, tensor: torch.Tensor) -> None:
        """Collective, outside of it: give a tensor back its values."""
        storage = tensor.untyped_storage()
        if storage._cdata in self._emptied:
            self._fill(storage._cdata, storage, False)

    @staticmethod
    def _storages(values: Any) -> dict[int, torch.UntypedStorage]:
        tensors = (one for one in tree_leaves(values) if isinstance(one, torch.Tensor) and one.device.type == "cpu")
        return {storage._cdata: storage for storage in (tensor.untyped_storage() for tensor in tensors)}

    def _empty(self, of: StorageWeakRef) -> None:
        storage = _alive(of)
        if storage is None or not storage.resizable():  # it is gone; or mapped from a file, or numpy has seen it
            return
        whole = torch.empty(0, dtype=torch.uint8).set_(storage)
        part = self._shares(whole)[self._topology.rank].clone()
        # A weak reference keeps the address from being used again, so those of tensors that are gone must go.
        self._emptied = {key: emptied for key, emptied in self._emptied.items() if not emptied.of.expired()}
        self._emptied[storage._cdata] = _Emptied(of, len(whole), part)
        storage.resize_(0)

    def _fill(self, key: int, storage: torch.UntypedStorage, overwritten: bool) -> None:
        emptied = self._emptied.pop(key)
        storage.resize_(emptied.bytes)
        if overwritten:
            return
        # Not by a gathering of all, for which Gloo makes a second copy of the whole. Zeros, because in a dry run nobody sends the
        # shares of the ranks that are made up.
        shares = self._shares(torch.empty(0, dtype=torch.uint8).set_(storage).zero_())
        shares[self._topology.rank].copy_(emptied.part)
        for rank, share in enumerate(shares):
            if len(share):
                sent = share.to(self._topology.device)
                dist.broadcast(sent, rank)
                if sent is not share:
                    share.copy_(sent)

    def _shares(self, whole: torch.Tensor) -> list[torch.Tensor]:
        """Views of a storage's bytes, one of each rank, of whole numbers."""
        size = -(-len(whole) // (8 * self._topology.world)) * 8
        return [whole[size * rank :][:size] for rank in range(self._topology.world)]


def _alive(of: StorageWeakRef) -> torch.UntypedStorage | None:
    return torch.UntypedStorage._new_with_weak_ptr(of.cdata)


def _spans(tensor: torch.Tensor, size: int) -> bool:
    return tensor.numel() * tensor.element_size() == size and tensor.is_contiguous()
