"""A CUDA device that is not there: tensors without numbers, on which operations of two devices, and waits for one, are errors.

`FakeTensorMode` knows what every operation makes of shapes, types and devices; what needs a number (`.item()`, `nonzero`, a bool
as index) has none to give and raises. On a card each of these is a wait of the host. So a model that passes here neither mixes
devices nor waits in a forward and a backward pass; what it computes is for tests on a CPU, how fast for those marked `gpu`.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ctrsink.sequences.batch import Batch

# Of a device that computes by itself autograd's engine wants threads and streams, which a build for CPUs has not. Of this one,
# which is no CPU either, it wants none. Autocast does not know it: precision is for other tests.
CARD = "lazy:0"
_CARD, _META = 17, 14  # c10::DeviceType


@contextmanager
def fake_cuda() -> Iterator[FakeTensorMode]:
    """Tensors made in here are fake ones, on whatever device; copies between devices that the host waits for are errors."""
    _allow()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with (
        patch("torch.autocast", lambda *args, **kwargs: nullcontext()),
        patch("torch.is_autocast_enabled", lambda *args: False),
        patch("torch.lazy", SimpleNamespace(), create=True),  # whose generator checkpointed layers would ask for
        mode,
        NoWaits(),
    ):
        yield mode


def _allow() -> None:
    """Torch asks a guard of the device, which it lacks, which one is current: give it that of `meta`, which does nothing."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * (_CARD + 1)).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    guards[_CARD] = guards[_META]


class NoWaits(TorchDispatchMode):
    """Refuses copies from the device, and copies to it that are not told to be `non_blocking`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            source = args[1] if func is torch.ops.aten.copy_.default else args[0]
            free = kwargs.get("non_blocking", False) or (len(args) > 2 and args[2])
            if source.device.type != out.device.type and not (free and out.device.type == "lazy"):
                raise AssertionError(f"the host waits for a copy of {tuple(out.shape)} from {source.device} to {out.device}")
        return out


def moved(model: nn.Module, mode: FakeTensorMode) -> None:
    """Put every parameter and buffer on the device, as `model.to` does; a tensor that is neither stays where it was."""
    for module in model.modules():
        for name, value in module._parameters.items():
            if value is not None:
                on_device = mode.from_tensor(value.detach()).to(CARD, non_blocking=True)
                module._parameters[name] = nn.Parameter(on_device, value.requires_grad)
        for name, value in module._buffers.items():
            if value is not None:
                module._buffers[name] = mode.from_tensor(value).to(CARD, non_blocking=True)


def sent(batch: Batch, mode: FakeTensorMode) -> Batch:
    """The batch on the device."""
    return batch.mapped(mode.from_tensor).to(CARD)
