"""Exported models of random weights, and histories that grow, change and are cut, for the model's side of serving."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctrsink.dataset.reader import Dataset
from ctrsink.export.package import export_run
from ctrsink.serve import request_of
from tests.serving_fixtures import SINKS, Prepared, run_spec, write_run

READOUTS = {
    "all-attend": {"over": "all", "form": "attend"},
    "sinks-attend": {"over": "sinks", "form": "attend"},
    "sinks-pool": {"over": "sinks", "form": "pool"},
}


LASTING = {"sinks": SINKS | {"signals": ["previous_gap"]}}
"""Of a model whose signals stay what they are when a history grows."""


def exported(data: Prepared, folder: Path, examples: str, readout: str, model: dict[str, Any] | None = None, **more: Any) -> str:
    """The folder of a model with sinks, inter-sink bias, temporal bias and merged LoRA."""
    signals = ["previous_gap"] if examples == "per_user" else ["time_gap", "recency_rank"]
    if examples == "per_user":
        more = {"targets": 3} | more
    told = {"sinks": SINKS | {"signals": signals}, "temporal": True} | (model or {})
    spec = run_spec(data, str(folder / "run"), model=told, readout=READOUTS[readout], examples=examples, **more)
    write_run(spec)
    export_run(spec.run_dir, str(folder / "out"))
    return str(folder / "out")


@dataclass(frozen=True)
class Pool:
    """Items and moments to make requests of."""

    items: list[dict[str, Any]]

    @classmethod
    def of(cls, data: Prepared) -> "Pool":
        return cls(request_of(Dataset(data.uri), 0, 0, list(range(6)))["candidates"])

    def request(self, behaviours: list[tuple[int, int]], candidates: list[int], user: str = "u") -> dict[str, Any]:
        """`behaviours` are pairs of item and feedback, a day apart each; those asked for have the items `candidates`."""
        history = [
            {"item": self.items[item], "feedback": feedback or None, "timestamp": 86400 * 365 * 30 + 3600 * 25 * place}
            for place, (item, feedback) in enumerate(behaviours)
        ]
        chosen = [self.items[item] for item in candidates]
        return json.loads(json.dumps({"history": history, "candidates": chosen, "timestamp": 86400 * 365 * 31, "user": user}))
