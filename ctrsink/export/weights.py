"""Weights into safetensors as transformers has them, by shards; of all of them one tensor is made at a time."""

import json
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards

from ctrsink.train.checkpoint.tensor_file import pieces
from ctrsink.train.tensors import Tensors

SHARD_BYTES = 5 * 10**9
"""What a file may hold: what huggingface_hub takes, and what most of its models have."""


def write_weights(folder: Path, tensors: Tensors) -> None:
    """`model.safetensors`; of more than SHARD_BYTES, `model-00001-of-0000n.safetensors` and so on, and their index."""
    # Largest type first: every value lies at a multiple of its own size.
    ordered = sorted(tensors.sources.items(), key=lambda entry: -entry[1].dtype.itemsize)
    shapes = {name: torch.empty(source.shape, dtype=source.dtype, device="meta") for name, source in ordered}
    split = split_torch_state_dict_into_shards(shapes, max_shard_size=SHARD_BYTES)
    for file_name, names in split.filename_to_tensors.items():
        write_tensors(folder / file_name, Tensors({name: tensors.sources[name] for name in names}))
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def write_tensors(path: Path, tensors: Tensors) -> None:
    """One safetensors file, of which one tensor is made at a time."""
    with path.open("wb") as file:
        for piece in pieces(tensors, {"format": "pt"}):
            file.write(piece)
