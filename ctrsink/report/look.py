"""A look into a trained run: where targets look, before and after, with and without biases; what each number is worth."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ctrsink.attention.shares import watched
from ctrsink.evaluate.metrics import auc, logloss
from ctrsink.families.decoder.build import build_model
from ctrsink.families.decoder.model import CTRModel
from ctrsink.prepare.tokenize import load_tokenizer
from ctrsink.sequences.batch import Batch
from ctrsink.stream.stream import SequenceSource, evaluation_batches
from ctrsink.train.restore import TrainedRun, restore_run

BATCH = 16
Shares = dict[str, list[float]]
"""Share of a target's attention to its history that goes to sinks, by head, by layer."""


def look(run_dir: str, split: str = "valid", sequences: int = 64) -> dict[str, Any]:
    """What a run has learned to look at, on a fixed random sample of a split.

    Returns:
        `attention_to_sinks`: by layer and head, of the model `untrained`, `trained`, and trained `without_bias` (similarity,
        temporal and inter-sink bias set to 0); nothing without sinks. `signals`: for each number that targets are told, how much
        AUC falls and log loss rises where it is set to its mean; the model is not trained anew.

    Raises:
        InputError: there is no such run.
    """
    run = restore_run(run_dir)
    source = SequenceSource(run.dataset, split, run.layout, newest=True)
    batches = list(evaluation_batches(source, BATCH, 0, 1, sequences))
    found: dict[str, Any] = {"run_dir": run_dir, "split": split, "impressions": sum(batch.impressions for batch in batches)}
    if run.layout.sinks:
        spec = run.spec.model.model_copy(update={"attention": "sdpa"})
        untrained = build_model(spec, len(load_tokenizer(run.spec.data.uri)), run.spec.seed).eval()
        with _without_biases(run.model) as silenced:
            without = shares_of(run, silenced, batches)
        found["attention_to_sinks"] = {
            "untrained": shares_of(run, untrained, batches),
            "trained": shares_of(run, run.model, batches),
            "without_bias": without,
        }
    found["signals"] = _worth(run, batches)
    return found


def shares_of(run: TrainedRun, model: CTRModel, batches: list[Batch]) -> Shares:
    """By layer, of each head, the mean over the batches in which targets see a history."""
    found: dict[int, list[list[float]]] = {}
    for batch in batches:
        with torch.inference_mode(), watched(model, batch, run.readout) as share:
            model(batch, run.readout)
        for layer, heads in share.heads.items():
            found.setdefault(layer, []).append(heads)
    return {f"layer{layer:02}": np.mean(heads, axis=0).round(4).tolist() for layer, heads in sorted(found.items())}


@contextmanager
def _without_biases(model: CTRModel) -> Iterator[CTRModel]:
    """The model, whose biases are 0 meanwhile."""
    names = ("similarity", "temporal", "biases")
    kept = {name: value.detach().clone() for name, value in model.named_parameters() if name.split(".")[0] in names}
    with torch.no_grad():
        for name in kept:
            model.get_parameter(name).zero_()
    try:
        yield model
    finally:
        with torch.no_grad():
            for name, value in kept.items():
                model.get_parameter(name).copy_(value)


def _worth(run: TrainedRun, batches: list[Batch]) -> dict[str, dict[str, float]]:
    whole = _measured(run, batches)
    found = {}
    for place, name in enumerate(run.layout.target_numbers):
        without = _measured(run, [_without(batch, place) for batch in batches])
        found[name] = {"auc": whole[0] - without[0], "logloss": without[1] - whole[1]}
    return found


def _without(batch: Batch, place: int) -> Batch:
    asked, readout = batch.asked_numbers.clone(), batch.readout_numbers.clone()
    asked[..., place], readout[..., place] = 0.0, 0.0
    return replace(batch, asked_numbers=asked, readout_numbers=readout)


def _measured(run: TrainedRun, batches: list[Batch]) -> tuple[float, float]:
    labels, logits = [], []
    for batch in batches:
        with torch.inference_mode():
            logits.append(run.model(batch, run.readout)[1][batch.readout_valid])
        labels.append(batch.labels[batch.readout_valid])
    told, found = torch.cat(labels).numpy(), torch.cat(logits).double().sigmoid().numpy()
    return auc(told, found), logloss(told, found)
