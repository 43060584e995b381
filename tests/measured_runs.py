"""Folders of runs as training leaves them, with made-up predictions of known quality."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from ctrsink.config import dump_run, parse_run
from ctrsink.config.load import merge
from ctrsink.dataset.reader import Dataset
from ctrsink.evaluate.baselines import smoothed_item_mean
from ctrsink.evaluate.prediction_file import table_of, write_predictions
from ctrsink.evaluate.predictions import Predictions
from tests.builders import run_tree


def write_run(
    folder: Path, data: str, name: str, seed: int, skill: float = 0.5, splits: tuple[str, ...] = ("test",), **changes: Any
) -> str:
    """A finished run whose scores are noise (`seed`) and `skill` times the label."""
    tree = run_tree(run_dir=str(folder), name=name, seed=seed, data={"uri": data})
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_run(parse_run(merge(tree, changes), "the test")))
    result = {"steps": 4, "finished": True, "impressions": 100, "seconds": 2.0 + seed}
    (folder / "result.json").write_text(json.dumps(result))
    dataset, chance = Dataset(data), np.random.default_rng(seed)
    for split in splits:
        shown = smoothed_item_mean(dataset, split)
        scores = 1 / (1 + np.exp(-skill * (2 * shown.labels - 1) - chance.normal(size=len(shown.labels))))
        found = Predictions(shown.users, shown.events, shown.labels, scores)
        write_predictions(str(folder), split, table_of(dataset, found), {"step": 4, **found.metrics()})
    return str(folder)
