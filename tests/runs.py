"""A small data set with a taste to learn, and the configuration of a short run on it."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from ctrsink.config import PrepareSpec
from ctrsink.config.load import merge
from ctrsink.prepare.build import prepare
from tests.data_fixtures import make_events, write_published_100k


def prepared_data(uri: str, users: int = 30, per_user: int = 14) -> str:
    """Prepare a small MovieLens-like log (420 events) at `uri`, local or s3://; returns `uri`."""
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as raw:
        write_published_100k(Path(raw), make_events(users, per_user))
        tree = {
            "source": {"kind": "movielens", "path": raw},
            "text": {"item": "{title} {genres}", "separator": ""},
            "tokenizer": {"train_vocabulary": 300},
            "shard_events": 150,
        }
        prepare(PrepareSpec.model_validate(tree), uri)
    return uri


def run_tree(data: str, run_dir: str, **changes: Any) -> dict[str, Any]:
    """The mapping of a run of 20 steps in two stages on a Llama of a few thousand parameters."""
    tree: dict[str, Any] = {
        "run_dir": run_dir,
        "data": {"uri": data, "examples": "per_user", "history": 3, "targets": 4},
        "model": {
            "backbone": {
                "config": {
                    "model_type": "llama",
                    "hidden_size": 16,
                    "intermediate_size": 32,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                    "num_key_value_heads": 1,
                    "max_position_embeddings": 512,
                    "attention_dropout": 0.1,
                }
            },
            "sinks": {"signals": ["previous_gap"], "embedding_size": 8},
        },
        "stages": [
            {
                "name": "align",
                "readout": {"over": "sinks"},
                "trainable": ["sink", "bias", "head"],
                "lr": {"sink": 0.01, "bias": 0.01, "head": 0.01},
                "steps": 8,
            },
            {
                "name": "all",
                "trainable": ["sink", "bias", "head", "backbone"],
                "lr": {"sink": 0.01, "bias": 0.01, "head": 0.01, "backbone": 0.003},
                "steps": 12,
            },
        ],
        "train": {"batch_size": 8, "micro_batch_size": 4, "checkpoint_every": 100, "log_every": 1},
    }
    return merge(tree, changes)


def train_process(folder: Path, data: str, **changes: Any) -> subprocess.Popen[str]:
    """`ctrsink train --json` on a run without end, in a process of its own that is ready to be stopped."""
    tree = run_tree(data, str(folder / "run"), **changes)
    tree["stages"][1]["steps"] = 100_000
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    command = [sys.executable, "-m", "ctrsink", "train", "--config", str(folder / "run.yaml"), "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)
    assert process.stderr is not None
    for line in process.stderr:
        if "step 15" in line:
            return process
    raise AssertionError("the run ended before step 15")
