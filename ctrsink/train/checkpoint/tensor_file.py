"""Named fp32 tensors as one buffer in the safetensors format, for a thread beside the one that trains."""

import json

import torch


def to_safetensors(tensors: dict[str, torch.Tensor]) -> memoryview:
    """The bytes that `safetensors.torch.load` reads; one copy of the tensors, and Python runs on while it is made.

    The library's own `save` makes two, and holds the interpreter's lock meanwhile: a third of a second for a large LoRA, seconds
    for a whole model, in which no other thread can start a kernel. Format: huggingface.co/docs/safetensors, "Format".

    Args:
        tensors: fp32, of any shape, on the CPU.
    """
    header, end = {}, 0
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32:
            raise TypeError(f"{name} is {tensor.dtype}, not float32")
        size = 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    whole = torch.empty(start + end, dtype=torch.uint8)
    whole[:start] = torch.frombuffer(bytearray(len(text).to_bytes(8, "little") + text), dtype=torch.uint8)
    values = whole[start:]
    for name, tensor in tensors.items():
        first, last = header[name]["data_offsets"]
        values[first:last] = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return whole.numpy().data
