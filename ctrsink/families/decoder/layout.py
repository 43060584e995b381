"""The layout of a decoder's sequences, and what is refused before a run."""

import logging
from collections.abc import Callable

from ctrsink.config import RunSpec
from ctrsink.config.data import DataSpec
from ctrsink.config.model import DecoderSpec
from ctrsink.dataset.layout import Layout, require_signals, scales_of
from ctrsink.dataset.manifest import Manifest
from ctrsink.errors import InputError, first_line
from ctrsink.families.facts import Facts

log = logging.getLogger("ctrsink.train")


def layout(data: DataSpec, model: DecoderSpec, manifest: Manifest) -> Layout:
    """See Family.layout."""
    sinks, target, sparse = model.sinks, model.target, model.sparse
    numbers = sinks.numbers if sinks else ()
    target_numbers = target.numbers if target else ()
    names = (*(sinks.signals if sinks else ()), *(target.signals if target else ()), *((model.base,) if model.base else ()))
    require_signals(data.uri, manifest, names, "model.sinks", sinks.buckets if sinks else 0)
    found = Layout(
        family=model.family,
        examples=data.examples,
        history=data.history,
        targets=data.targets_per_sequence,
        signals=sinks.categories if sinks else (),
        buckets=sinks.buckets if sinks else 1,
        rows=sinks.rows if sinks else 1,
        retrieve=data.retrieve,
        retrieve_by=data.retrieve_by,
        numbers=numbers,
        target_signals=target.categories if target else (),
        target_rows=target.rows if target else 1,
        target_numbers=target_numbers,
        base=model.base,
        similarity=model.similarity,
        text_history=data.text_history,
        window=model.window if sparse is None else sparse.window,
        chunks=0 if sparse is None else sparse.chunks,
        transition=0 if sparse is None else sparse.transition,
        utc_offset_hours=data.utc_offset_hours,
        scales=scales_of(manifest, (*numbers, *target_numbers)),
    )
    return found.on(manifest, data.uri)


def check(run: RunSpec, manifest: Manifest, vocabulary: Callable[[], int]) -> Facts:
    """See Family.check."""
    model: DecoderSpec = run.model  # pyright: ignore[reportAssignmentType]
    # No rule of the configuration: a run that was made so before there was this can still be read.
    if model.attention == "blocks" and run.runtime.device == "cuda":
        raise InputError("model.attention: blocks is for CPUs, and would ask a GPU about every block; use flex, or sdpa")
    for key, told in (("sinks", model.sinks), ("target", model.target)):
        if told is not None and "item_id" in told.signals and manifest.item_count >= told.rows:
            log.warning(
                "model.%s.rows %d: some of the %d items of %s share an embedding of item_id; from rows %d on none does",
                key, told.rows, manifest.item_count, run.data.uri, manifest.item_count + 1,
            )  # fmt: skip
    facts = Facts(_vocabulary(run, model, manifest, vocabulary))
    _check_sequences(run, model, manifest, facts)
    return facts


def _vocabulary(run: RunSpec, model: DecoderSpec, manifest: Manifest, vocabulary: Callable[[], int]) -> int:
    from transformers import AutoTokenizer  # takes a second and more: what is refused before is refused at once

    from ctrsink.prepare.tokenize import fingerprint

    backbone = model.backbone
    if backbone.path is None:
        found = vocabulary()
        from ctrsink.families.decoder.build import check_model  # seconds of imports, that no refusal above waits for

        check_model(model, found)
        return found
    try:
        tokenizer = AutoTokenizer.from_pretrained(backbone.path, revision=backbone.revision or "main", trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(f"model.backbone.path {backbone.path}: no tokenizer ({first_line(error)})") from None
    if fingerprint(tokenizer) != manifest.tokenizer_fingerprint:
        raise InputError(
            f"the data set {run.data.uri} was prepared with another tokenizer than that of {backbone.path}: "
            f"prepare it again with prepare.tokenizer.path={backbone.path} prepare.tokenizer.train_vocabulary=null"
        )
    return len(tokenizer)


def _check_sequences(run: RunSpec, model: DecoderSpec, manifest: Manifest, facts: Facts) -> None:
    """Refuse what would end the run at some later step: a sequence too long for the backbone, or one that shows its answers."""
    from ctrsink.families.decoder.build import backbone_config
    from ctrsink.families.decoder.supported import length_limit, too_long
    from ctrsink.families.foresee import foreseen

    limit, reason = length_limit(backbone_config(model, facts.vocabulary)) or (None, "")
    length = foreseen(run, layout(run.data, model, manifest), manifest, limit)
    if length is not None:
        raise InputError(too_long(reason, length))
