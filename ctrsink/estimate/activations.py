"""What a forward and a backward pass hold beside weights and gradients, found by running them on tensors without memory.

Every operation is run on fake tensors, which have a shape and a type and nothing else, and each storage is counted from the
operation that makes it until nothing needs it. That finds what is saved for the backward pass, what is computed again (gradient
checkpointing) and what lives for a moment alone, and takes neither the memory of the model nor that of the batch.
"""

import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ctrsink.config.stages import Objective
from ctrsink.families.protocol import CTRModule
from ctrsink.sequences.batch import Batch
from ctrsink.stream.stream import SequenceSource
from ctrsink.tables.embedding import ShardedEmbedding


class Activations(NamedTuple):
    """Bytes at the fullest moment of a pass, as a line over the tokens of the batch."""

    constant: float
    """Whatever the batch: narrowed weights, gradients of one of them at a time."""
    per_token: float
    fetched: float = 0.0
    """Bytes per token of rows of sharded tables, each as often as it is named."""

    def bytes(self, tokens: float) -> float:
        """Of a micro-batch of so many tokens."""
        return self.constant + self.per_token * tokens

    def tokens(self, memory: float) -> int:
        """Tokens of the largest micro-batch that fits into so many bytes; 0 where none does."""
        return max(0, int((memory - self.constant) / self.per_token))


class Peak(TorchDispatchMode):
    """Bytes of the storages that operations make and that are alive, and the most there were at a time.

    Args:
        known: what was there before, and is not counted.
    """

    def __init__(self, known: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.alive = self.most = 0
        # By the address of the storage's own object: those without memory have no other.
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage())
        self.most = max(self.most, self.alive)
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.alive += storage.nbytes()
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.alive -= self._sizes.pop(key, 0)


def activations_of(shape: CTRModule, source: SequenceSource, objective: Objective) -> Activations:
    """The line through two batches, of a long sequence 4 and 16 times: what no token adds to is its constant.

    Where attention pads (`sdpa`), sequences of unequal lengths in one batch hold more for each of their tokens.

    Args:
        shape: a model of `Family.shape`, in training, as a stage trains it; it is used up.
    """
    long = source.some()
    batches = [shape.drawn(source.build(long.repeat(times)), objective, 0) for times in (4, 16)]
    with FakeTensorMode() as mode:
        become_fake(shape)
        low, high = (_most(shape, batch.mapped(mode.from_tensor), objective) for batch in batches)
    fewer, more = (batch.tokens for batch in batches)
    per_token = (high - low) / (more - fewer)
    fetched = sum(part.bytes for part in shape.modules() if isinstance(part, _Fetched))
    return Activations(max(0.0, low - per_token * fewer), per_token, fetched / more)


def _most(model: CTRModule, batch: Batch, objective: Objective) -> int:
    """Bytes of a pass over a fake batch."""
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:  # accounted for elsewhere: they are added to in place
        parameter.grad = torch.empty_like(parameter)
    known = [*model.parameters(), *model.buffers(), *(p.grad for p in trained if p.grad is not None)]
    with Peak(known) as peak:
        model(batch, objective).loss.backward()
    return peak.most


def become_fake(module: nn.Module) -> None:
    """Put tensors without memory, but on the CPU by name, in place of those of the meta device, which autocast would not narrow.

    A sharded table is left out: of it a pass holds what it fetches.
    """
    made: dict[int, torch.Tensor] = {}

    def fake(old: torch.Tensor, make: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        if id(old) not in made:
            made[id(old)] = make(torch.empty(old.shape, dtype=old.dtype))
        return made[id(old)]

    for part in list(module.modules()):
        for name, child in part.named_children():
            if isinstance(child, ShardedEmbedding):
                setattr(part, name, _Fetched(child.table.width))
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None:
                trained = value.requires_grad
                part._parameters[name] = fake(value, lambda made, trained=trained: nn.Parameter(made, trained))  # pyright: ignore[reportArgumentType]
        for name, value in part._buffers.items():
            if value is not None:
                part._buffers[name] = fake(value, lambda made: made)


class _Fetched(nn.Module):
    """A sharded table as it looks to a pass that names no row twice: a copy of these rows, which has a gradient."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.bytes = width, 0

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        self.bytes = 4 * ids.numel() * self.width
        rows = torch.empty(ids.numel(), self.width, requires_grad=torch.is_grad_enabled())
        return nn.functional.embedding(ids, rows)
