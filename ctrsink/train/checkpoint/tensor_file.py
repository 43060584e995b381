"""Named fp32 tensors as one buffer in the safetensors format, for a thread beside the one that trains."""

import json
import os
from collections.abc import Iterator, Mapping
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any

import torch

from ctrsink.errors import RunError
from ctrsink.train.tensors import Source, Tensors


def to_safetensors(tensors: Mapping[str, torch.Tensor]) -> memoryview:
    """The bytes that `safetensors.torch.load` reads; one copy of the tensors, and Python runs on while it is made.

    The library's own `save` makes two, and holds the interpreter's lock meanwhile: a third of a second for a large LoRA, seconds
    for a whole model, in which no other thread can start a kernel. Format: huggingface.co/docs/safetensors, "Format".

    Args:
        tensors: fp32, of any shape, on the CPU.
    """
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32:
            raise TypeError(f"{name} is {tensor.dtype}, not float32")
    head, places = _head({name: tensor.shape for name, tensor in tensors.items()})
    whole = torch.empty(len(head) + max((end for _, end in places.values()), default=0), dtype=torch.uint8)
    whole[: len(head)] = torch.frombuffer(bytearray(head), dtype=torch.uint8)
    values = whole[len(head) :]
    for name, tensor in tensors.items():
        first, last = places[name]
        values[first:last] = _bytes_of(tensor)
    return whole.numpy().data


def pieces(tensors: Tensors) -> Iterator[bytes | memoryview]:
    """The same bytes in pieces, a tensor each, which is made when its turn comes."""
    head, _ = _head({name: source.shape for name, source in tensors.sources.items()})
    yield head
    for tensor in tensors.values():
        yield _bytes_of(tensor).numpy().data


def opened(path: Path) -> Tensors:
    """The tensors of such a file, each read when it is asked for, into memory of its own; the file may be deleted meanwhile.

    Raises:
        ValueError: it is no such file.
    """
    file = path.open("rb", buffering=0)
    size = int.from_bytes(file.read(8), "little")
    if size > path.stat().st_size:
        raise ValueError(f"{path} has no header")
    header: dict[str, dict[str, Any]] = json.loads(file.read(size))
    sources = {}
    for name, entry in header.items():
        if entry["dtype"] != "F32":
            raise ValueError(f"{name} is {entry['dtype']}, not F32")
        shape = torch.Size(entry["shape"])
        sources[name] = Source(shape, partial(_read, file, 8 + size + entry["data_offsets"][0], shape))
    return Tensors(sources)


def _read(file: FileIO, start: int, shape: torch.Size) -> torch.Tensor:
    tensor = torch.empty(shape)
    left = _bytes_of(tensor).numpy().data
    while left:
        count = os.preadv(file.fileno(), [left], start)
        if not count:
            raise RunError(f"{file.name} was cut while it was read")
        left, start = left[count:], start + count
    return tensor


def _head(shapes: dict[str, torch.Size]) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """What stands before the values, and where among these each tensor lies."""
    places, end = {}, 0
    for name, shape in shapes.items():
        places[name] = end, end + 4 * shape.numel()
        end = places[name][1]
    header = {name: {"dtype": "F32", "shape": list(shapes[name]), "data_offsets": list(place)} for name, place in places.items()}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, places


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
