"""Runs whose checkpoint was written by hand: random weights, no training."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ctrsink.config import PrepareSpec, RunSpec, parse_run
from ctrsink.dataset.manifest import read_manifest
from ctrsink.families.decoder.build import build_model
from ctrsink.families.decoder.groups import trained_as
from ctrsink.prepare.build import prepare
from ctrsink.prepare.tokenize import load_tokenizer
from ctrsink.run.folder import claim
from ctrsink.train.checkpoint.checkpoint import Checkpoint, save_checkpoint
from tests.data_fixtures import make_events, prepare_spec, table_source

LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}
SINKS = {"signals": ["time_gap", "recency_rank"], "buckets": 20, "embedding_size": 8}


@dataclass(frozen=True)
class Prepared:
    """A data set and the preparation that made it."""

    uri: str
    spec: PrepareSpec


def prepared(folder: Path, users: int = 5, per_user: int = 8) -> Prepared:
    """A small data set below `folder`."""
    source = table_source(folder / "raw", make_events(users, per_user))
    # Its requests hold several events; here each event is asked for by itself.
    columns = source.columns.model_copy(update={"request": None})
    spec = prepare_spec(source.model_copy(update={"columns": columns}))
    uri = str(folder / "data")
    prepare(spec, uri)
    return Prepared(uri, spec)


def run_spec(
    data: Prepared,
    run_dir: str,
    trainable: tuple[str, ...] = ("sink", "bias", "head", "lora"),
    model: dict[str, Any] | None = None,
    readout: dict[str, str] | None = None,
    **sequences: Any,
) -> RunSpec:
    """A run of one stage on `data`; `model` and `sequences` (of section data) replace the defaults."""
    lora = {"rank": 2, "alpha": 4} if "lora" in trainable else None
    tree = {
        "name": "by-hand",
        "run_dir": run_dir,
        "seed": 3,
        "prepare": data.spec.model_dump(mode="json"),
        "data": {"uri": data.uri, "examples": "per_target", "history": 4, **sequences},
        "model": {"backbone": {"config": LLAMA}, "sinks": SINKS, "bias": {"layers": 1.0}, "lora": lora, **(model or {})},
        "stages": [
            {
                "name": "only",
                "trainable": list(trainable),
                "lr": dict.fromkeys(trainable, 0.01),
                "steps": 5,
                "readout": readout or {"over": "all", "form": "attend"},
            }
        ],
        "train": {"batch_size": 4, "micro_batch_tokens": 200},
    }
    return parse_run(tree, "test")


def write_run(spec: RunSpec, step: int = 5) -> None:
    """A run directory with a checkpoint of random values for everything that the run's stage trains."""
    identity = read_manifest(spec.data.uri).identity
    claim(spec, resume=True, datasets=(identity,))
    model = build_model(spec.model, len(load_tokenizer(spec.data.uri)), spec.seed)
    generator = torch.Generator().manual_seed(step)
    parameters = {
        # Large enough that sinks, bias and adapters each move the scores.
        name: value.detach() + 0.2 * torch.randn(value.shape, generator=generator)
        for name, value in model.named_parameters()
        if trained_as(name, spec.stages[-1].trainable)
    }
    save_checkpoint(spec.run_dir, Checkpoint(step, step * spec.train.batch_size, parameters, {}, {}, identity))
