"""A decoder without sinks as one of transformers' own: sequence classification, whose last token's state gives the logit."""

import json
from collections.abc import Callable
from typing import Any

import torch
from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, AutoModelForSequenceClassification

from ctrsink.config.model import DecoderSpec
from ctrsink.config.stages import Objective
from ctrsink.errors import InputError
from ctrsink.families.decoder.export import merged, plain_fields
from ctrsink.families.decoder.model import CTRModel
from ctrsink.families.protocol import CTRModule, Plain
from ctrsink.sequences.batch import Batch
from ctrsink.sequences.columns import TARGETS

_BACKBONE, _HEAD, _SCORE = "backbone.", "head.linear.weight", "score.weight"


def plain(module: CTRModule, model: DecoderSpec, objective: Objective, padding: int | None) -> Plain:
    """See Family.plain.

    Raises:
        InputError: it has a part, or reads a state, that transformers' class has not.
    """
    assert isinstance(module, CTRModel)
    if more := _beyond(model, objective):
        raise InputError(f"the model is no plain decoder, for it has {' and '.join(more)}: leave out --form plain")
    found = merged(module, model)
    config: Any = module.backbone.config
    kind: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(config), None)
    if kind is None:
        raise InputError(
            f"transformers has no sequence classification of {config.model_type}, which a plain decoder would be: "
            "leave out --form plain"
        )
    told = type(config)(**plain_fields(config) | {"num_labels": 1, "pad_token_id": padding})
    with torch.device("meta"):
        shell = kind(told)
    prefix = f"{shell.base_model_prefix}."
    weights = {_SCORE if name == _HEAD else name.replace(_BACKBONE, prefix, 1): make for name, make in found.weights.items()}
    if odd := sorted(weights.keys() ^ shell.state_dict().keys()):
        raise InputError(f"{kind.__name__} is no backbone with a score ({odd[0]}): leave out --form plain")
    names = {f"^{prefix.replace('.', '[.]')}": f"ctr.{_BACKBONE}", "^score[.]": "ctr.head.linear."}
    shapes = {name: place.shape for name, place in shell.state_dict().items()}
    fields = json.loads(told.to_json_string()) | {"architectures": [kind.__name__]}
    return Plain(fields, weights, shapes, names, found.section, found.layers)


def _beyond(model: DecoderSpec, objective: Objective) -> list[str]:
    """What transformers' class would not compute."""
    parts = {
        "sinks (model.sinks)": model.sinks,
        "told targets (model.target)": model.target,
        "a base score (model.base)": model.base,
        "a window (model.window)": model.window,
        "a layer norm in its head (model.head: norm), which cannot be folded into a linear map": model.head == "norm",
        "a readout by the mean of states (readout.form: pool)": objective.readout.form == "pool",
    }
    return [name for name, there in parts.items() if there]


def plain_logits(folder: str) -> Callable[[Batch], torch.Tensor]:
    """See Family.plain_logits: each target's tokens, and those before it that it sees, as one prompt."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, local_files_only=True).eval()

    def logits(batch: Batch) -> torch.Tensor:
        return torch.cat([model(input_ids=ids[None]).logits[0].float() for ids in prompts(batch)])

    return logits


def prompts(batch: Batch) -> list[torch.Tensor]:
    """The tokens of each target's text and of all that stands before it, int64 [L]."""
    read, targets = batch.inputs, batch.axes[TARGETS]
    starts = batch.axes["positions"].offsets[targets.owner]
    found = []
    for start, last in zip(starts.tolist(), read["readout_positions"].tolist(), strict=True):
        part = slice(start, last + 1)
        events, candidate = read["event_ids"][part], read["candidate"][part]
        # Of targets that share a history, each sees its own text only.
        found.append(read["input_ids"][part][~candidate | (events == events[-1])])
    return found
