"""Named tensors in the safetensors format, in pieces or as one buffer, for a thread beside the one that trains."""

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

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64", torch.int32: "I32", torch.bool: "BOOL"}
"""What the format calls them."""


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
    head, places = _head({name: Source(tensor.shape, tensor.detach) for name, tensor in tensors.items()})
    whole = torch.empty(len(head) + max((end for _, end in places.values()), default=0), dtype=torch.uint8)
    whole[: len(head)] = torch.frombuffer(bytearray(head), dtype=torch.uint8)
    values = whole[len(head) :]
    for name, tensor in tensors.items():
        first, last = places[name]
        values[first:last] = _bytes_of(tensor)
    return whole.numpy().data


def pieces(tensors: Tensors, told: Mapping[str, str] | None = None) -> Iterator[bytes | memoryview]:
    """The same bytes in pieces, a tensor each, which is made when its turn comes; of any type in `_DTYPES`.

    Args:
        told: what the header says of the whole file, `__metadata__` of the format.
    """
    head, _ = _head(tensors.sources, told)
    yield head
    for name, source in tensors.sources.items():
        tensor = source.make()
        if (tensor.shape, tensor.dtype) != (source.shape, source.dtype):
            raise TypeError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, not {source.dtype} {tuple(source.shape)}")
        yield _bytes_of(tensor).numpy().data


def opened(path: Path) -> Tensors:
    """The tensors of such a file, each read when it is asked for, into memory of its own; the file may be deleted meanwhile.

    Raises:
        ValueError: it is no such file.
    """
    file, places = _places(path)
    return Tensors({name: Source(shape, partial(_read, file, start, shape)) for name, (start, shape) in places.items()})


def mapped(path: Path) -> Tensors:
    """The same without memory of their own: pages of the file, which the system reads when they are used and may drop again.

    What is written to such a tensor goes to a copy of the page, never to the file.

    Raises:
        ValueError: it is no such file.
    """
    file, places = _places(path)
    file.close()
    whole: Any = torch.UntypedStorage.from_file(str(path), False, path.stat().st_size)
    return Tensors({name: Source(shape, partial(_view, whole, start, shape)) for name, (start, shape) in places.items()})


def _view(whole: torch.UntypedStorage, start: int, shape: torch.Size) -> torch.Tensor:
    # The header is a multiple of 8 bytes.
    return torch.empty(0).set_(whole, start // 4, shape)  # pyright: ignore[reportCallIssue, reportArgumentType]


def _places(path: Path) -> tuple[FileIO, dict[str, tuple[int, torch.Size]]]:
    """Where in the file each tensor starts, and its shape."""
    file = path.open("rb", buffering=0)
    size = int.from_bytes(file.read(8), "little")
    if size > path.stat().st_size:
        raise ValueError(f"{path} has no header")
    header: dict[str, dict[str, Any]] = json.loads(file.read(size))
    for name, entry in header.items():
        if entry["dtype"] != "F32":
            raise ValueError(f"{name} is {entry['dtype']}, not F32")
    return file, {name: (8 + size + entry["data_offsets"][0], torch.Size(entry["shape"])) for name, entry in header.items()}


def _read(file: FileIO, start: int, shape: torch.Size) -> torch.Tensor:
    tensor = torch.empty(shape)
    left = _bytes_of(tensor).numpy().data
    while left:
        count = os.preadv(file.fileno(), [left], start)
        if not count:
            raise RunError(f"{file.name} was cut while it was read")
        left, start = left[count:], start + count
    return tensor


def _head(sources: Mapping[str, Source], told: Mapping[str, str] | None = None) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """What stands before the values, and where among these each tensor lies."""
    places, end = {}, 0
    for name, source in sources.items():
        places[name] = end, end + source.dtype.itemsize * source.shape.numel()
        end = places[name][1]
    header: dict[str, Any] = {"__metadata__": dict(told)} if told else {}
    for name, place in places.items():
        of = sources[name]
        header[name] = {"dtype": _DTYPES[of.dtype], "shape": list(of.shape), "data_offsets": list(place)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, places


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
