"""The forms of an exported model: merged, which stands alone; the adapter of a pretrained base; one of transformers' own."""

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from ctrsink.errors import InputError
from ctrsink.export.prompt import how_to_prompt
from ctrsink.export.weights import write_tensors, write_weights
from ctrsink.families.adapter import CONFIG, OWN, WEIGHTS, fingerprint
from ctrsink.families.hf import CLASSES, ExportedConfig
from ctrsink.families.parameters import DTYPES
from ctrsink.families.registry import family_of
from ctrsink.prepare.tokenize import has_control_tokens, load_tokenizer
from ctrsink.sequences.batch import Batch
from ctrsink.serve.knowledge import Knowledge
from ctrsink.serve.load import load_model
from ctrsink.train.restore import TrainedRun
from ctrsink.train.tensors import Source, Tensors


class Written(NamedTuple):
    """What a form has made of a run, its weights in a folder already."""

    config: dict[str, Any]
    """Of config.json."""
    load: Callable[[str], Callable[[Batch], torch.Tensor]]
    """What gives logits [T] of batches, from the folder once it is whole."""
    items: bytes | None
    """What is known of items, where that is needed."""
    parameters: int
    """Of the weights that were written."""
    merged_layers: int
    facts: list[str]
    """Sentences for the model card."""
    use: str | None = None
    """What the card says of its use; None: that of every model of ours."""


def merged(run: TrainedRun, folder: Path, dtype: str) -> Written:
    """LoRA becomes part of the weights, in fp32, and what the family narrows is cast to `dtype`."""
    family = family_of(run.spec.model.family)
    found = family.merged(run.model, run.spec.model)
    known, items = knowledge_of(run)
    config = config_of(run, found.section, dtype, known)
    with torch.device("meta"):  # proves that each tensor has its place
        shell = CLASSES[run.spec.model.family][1](config)
    narrow = {name for name in found.weights if family.narrowed(name)}
    sources = {}
    for name, place in shell.state_dict().items():
        inner = name.removeprefix("ctr.")
        kind = DTYPES[dtype] if inner in narrow and place.is_floating_point() else place.dtype
        sources[name] = Source(place.shape, partial(_cast, found.weights.pop(inner), kind), kind)
    if found.weights:
        raise InputError(f"the exported model has no place for {next(iter(found.weights))}")
    write_weights(folder, Tensors(sources))
    parameters = sum(source.shape.numel() for source in sources.values())
    facts = [f"{parameters:,} parameters; stored in {dtype} as far as the family narrows them."]
    if found.layers:
        facts.insert(0, f"LoRA was merged into the weights of {found.layers} layers, in fp32.")
    return Written(_plain(config), _ours, items, parameters, found.layers, facts)


def adapter(run: TrainedRun, folder: Path, dtype: str) -> Written:
    """What was trained beside the base, in PEFT's files and one of ours; the base's weights stay where they are."""
    if dtype != "fp32":
        raise InputError("an adapter is stored in fp32, and its base where it lies: leave out --dtype")
    found = family_of(run.spec.model.family).adapter(run.model, run.spec.model)
    if trained := sorted(found.base.keys() & run.checkpoint.parameters.keys()):
        raise InputError(
            f"the run trained weights of its base itself ({trained[0]}), which an adapter does not carry: "
            "leave out --form adapter"
        )
    known, items = knowledge_of(run)
    config = config_of(run, found.section, dtype, known)
    precision = run.checkpoint.precision or run.spec.train.precision
    config.base = {"precision": precision, "fingerprint": fingerprint(found.base, precision)}
    for name, weights in ((WEIGHTS, found.weights), (OWN, found.own)):
        write_tensors(folder / name, Tensors({key: Source(value.shape, value.detach) for key, value in weights.items()}))
    (folder / CONFIG).write_text(json.dumps(found.config, indent=2, sort_keys=True))
    parameters = sum(value.numel() for value in (*found.weights.values(), *found.own.values()))
    facts = [
        f"An adapter: the {sum(map(torch.numel, found.base.values())):,} weights of its base are not in this folder; it is for "
        f"`{found.origin.rstrip('/').rsplit('/', 1)[-1]}` and refuses another.",
        f"{parameters:,} parameters, in fp32.",
    ]
    return Written(_plain(config), _ours, items, parameters, 0, facts)


def plain(run: TrainedRun, folder: Path, dtype: str) -> Written:
    """A model of transformers' own, LoRA merged in fp32; what a request needs stands in its configuration, which keeps it."""
    family, manifest = family_of(run.spec.model.family), run.dataset.manifest
    tokenizer = load_tokenizer(run.dataset.uri, manifest)
    _require_prompt(run, tokenizer)
    padding: Any = tokenizer.pad_token_id
    found = family.plain(run.model, run.spec.model, run.objective, padding)
    known, items = knowledge_of(run)
    config = config_of(run, found.section, dtype, known)
    config.names = found.names
    kind = DTYPES[dtype]
    sources = {name: Source(found.shapes[name], partial(_cast, make, kind), kind) for name, make in found.weights.items()}
    write_weights(folder, Tensors(sources))
    parameters = sum(source.shape.numel() for source in sources.values())
    facts = [f"A plain `{found.config['architectures'][0]}` of {parameters:,} parameters in {dtype}, for transformers alone."]
    told = found.config | {"dtype": str(kind).removeprefix("torch."), "ctrsink": _plain(config)}
    use = how_to_prompt(manifest.text, list(manifest.prefix_tokens), run.layout.serving().history)
    return Written(told, family.plain_logits, items, parameters, found.layers, facts, use)


FORMS: dict[str, Callable[[TrainedRun, Path, str], Written]] = {"merged": merged, "adapter": adapter, "plain": plain}


def _require_prompt(run: TrainedRun, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse what the card's code cannot ask for, and prompts whose last token transformers would take for padding."""
    text, padding = run.dataset.manifest.text, tokenizer.pad_token
    if run.layout.retrieve is not None:
        raise InputError("the prompt of a plain decoder holds the newest behaviours, not those that data.retrieve finds")
    for name, template in (("item", text.item), ("feedback", text.feedback), ("separator", text.separator)):
        if padding and template.endswith(str(padding)):
            raise InputError(f"text.{name} ends in the padding token {padding}, behind which a plain decoder reads no logit")
    if has_control_tokens(tokenizer, text.item):
        raise InputError("text.item has control tokens, which the prompt of a plain decoder reads as letters")


def _plain(config: ExportedConfig) -> dict[str, Any]:
    return json.loads(config.to_json_string())


def _ours(folder: str) -> Callable[[Batch], torch.Tensor]:
    return load_model(folder).model


def knowledge_of(run: TrainedRun) -> tuple[dict[str, Any] | None, bytes | None]:
    """What the model's signals need of items, in plain values and as a file; None: nothing."""
    if not run.layout.events_of_signals:
        return None, None
    return Knowledge.of(run.dataset, "neighbours" in run.layout.needs, run.layout.columns).dump()


def config_of(run: TrainedRun, section: dict[str, Any], dtype: str, knowledge: dict[str, Any] | None) -> ExportedConfig:
    """All that turns a request into a probability, beside the weights."""
    manifest = run.dataset.manifest
    config, model = CLASSES[run.spec.model.family]
    return config(
        architectures=[model.__name__],
        dtype=str(DTYPES[dtype]).removeprefix("torch."),
        model=section,
        facts=dataclasses.asdict(run.facts),
        objective=run.objective.model_dump(mode="json"),
        layout=dataclasses.asdict(run.layout),
        text=manifest.text.model_dump(mode="json"),
        prefix_tokens=list(manifest.prefix_tokens),
        tokenizer_fingerprint=manifest.tokenizer_fingerprint,
        feedback_texts=list(manifest.feedback_texts) if "feedback" in run.layout.signals else None,
        knowledge=knowledge,
        encoder=manifest.encoder.model_dump(include={"max_tokens", "fingerprint"})
        if manifest.encoder and run.layout.needs_vectors
        else None,
    )


def _cast(make: Callable[[], torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    return make().to(dtype)
