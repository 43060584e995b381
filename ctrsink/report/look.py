"""A look into a trained run: where targets look, before and after, with and without biases; what each number is worth."""

from dataclasses import replace
from typing import Any

import torch

from ctrsink.evaluate.metrics import auc, logloss
from ctrsink.families.protocol import CTRModule
from ctrsink.families.registry import family_of, source_of
from ctrsink.sequences.batch import Batch
from ctrsink.stream.evaluation import evaluation_batches
from ctrsink.train.restore import TrainedRun, restore_run

BATCH = 16


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
    source = source_of(run.dataset, split, run.layout, newest=True)
    batches = list(evaluation_batches(source, BATCH, 0, 1, sequences))
    found: dict[str, Any] = {"run_dir": run_dir, "split": split, "impressions": sum(batch.impressions for batch in batches)}
    family, spec = family_of(run.spec.model.family), run.spec

    def untrained() -> CTRModule:
        return family.build(family.portable(spec.model), run.facts, spec.seed).eval()

    found |= family.looked(run.model, untrained, batches, run.objective)
    found["signals"] = _worth(run, batches)
    return found


def _worth(run: TrainedRun, batches: list[Batch]) -> dict[str, dict[str, float]]:
    whole = _measured(run, batches)
    found = {}
    for place, name in enumerate(run.layout.target_numbers):
        without = _measured(run, [_without(run, batch, place) for batch in batches])
        found[name] = {"auc": whole[0] - without[0], "logloss": without[1] - whole[1]}
    return found


def _without(run: TrainedRun, batch: Batch, place: int) -> Batch:
    inputs = dict(batch.inputs)
    for name in family_of(run.layout.family).target_numbers:
        inputs[name] = inputs[name].clone()
        inputs[name][:, place] = 0.0
    return replace(batch, inputs=inputs)


def _measured(run: TrainedRun, batches: list[Batch]) -> tuple[float, float]:
    labels, logits = [], []
    for batch in batches:
        with torch.inference_mode():
            found = run.model(batch, run.objective).logits
        assert found is not None
        logits.append(found[batch.targets.counted])
        labels.append(batch.targets.labels[batch.targets.counted])
    told, probabilities = torch.cat(labels).numpy(), torch.cat(logits).double().sigmoid().numpy()
    return auc(told, probabilities), logloss(told, probabilities)
