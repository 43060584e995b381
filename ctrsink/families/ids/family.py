"""The functions of a family that are the same for all that read no text; see families.protocol.Family."""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ctrsink.config import RunSpec
from ctrsink.config.data import DataSpec
from ctrsink.config.model.ids import IdsSpec
from ctrsink.config.stages import Objective
from ctrsink.dataset.layout import Layout, require_signals, scales_of
from ctrsink.dataset.manifest import Manifest
from ctrsink.families.facts import Facts, Wording, facts_of
from ctrsink.families.protocol import CTRModule
from ctrsink.features.registry import of_kind
from ctrsink.sequences import behaviours
from ctrsink.sequences.batch import Batch
from ctrsink.sequences.columns import Sequences
from ctrsink.sequences.windows import Cuts

log = logging.getLogger("ctrsink.train")
TARGET_NUMBERS = ("target_numbers",)


def layout(data: DataSpec, model: IdsSpec, manifest: Manifest) -> Layout:
    """See Family.layout."""
    names = (*model.behaviours, *model.target, *((model.base,) if model.base else ()))
    require_signals(data.uri, manifest, names, "model", model.buckets)
    numbers, target_numbers = (of_kind(side, numbers=True) for side in (model.behaviours, model.target))
    found = Layout(
        family=model.family,  # pyright: ignore[reportAttributeAccessIssue]
        examples=data.examples,
        history=data.history,
        targets=data.targets_per_sequence,
        signals=of_kind(model.behaviours, numbers=False),
        buckets=model.buckets,
        rows=model.rows,
        retrieve=data.retrieve,
        retrieve_by=data.retrieve_by,
        numbers=numbers,
        target_signals=of_kind(model.target, numbers=False),
        target_rows=model.rows,
        target_numbers=target_numbers,
        base=model.base,
        utc_offset_hours=data.utc_offset_hours,
        scales=scales_of(manifest, (*numbers, *target_numbers)),
    )
    return found.on(manifest, data.uri)


def encode(cuts: Cuts, layout: Layout, wording: Wording) -> Sequences:
    """See Family.encode."""
    return behaviours.encode(cuts, layout)


def encode_padded(cuts: Cuts, layout: Layout, wording: Wording) -> Sequences:
    """As `encode`, for a model that pads the sequences of a batch."""
    return replace(behaviours.encode(cuts, layout), padded=True)


def check(run: RunSpec, manifest: Manifest, vocabulary: Callable[[], int]) -> Facts:
    """See Family.check."""
    model: IdsSpec = run.model  # pyright: ignore[reportAssignmentType]
    if "item_id" in model.ids and manifest.item_count >= model.rows:
        log.warning(
            "model.rows %d: some of the %d items of %s share an embedding of item_id; from rows %d on none does",
            model.rows, manifest.item_count, run.data.uri, manifest.item_count + 1,
        )  # fmt: skip
    return facts_of(manifest, vocabulary())


def portable(model: IdsSpec) -> IdsSpec:
    """See Family.portable."""
    return model


def merged(module: Any, model: IdsSpec) -> tuple[dict[str, Any], int]:
    """See Family.merged: sharded tables become whole ones, and rows that training never met the unknown."""
    module.embedding.settle()
    module.embedding.unshard()
    return model.model_copy(update={"id_tables": "dense"}).model_dump(mode="json"), 0


def looked(module: Any, untrained: Callable[[], CTRModule], batches: list[Batch], objective: Objective) -> dict[str, Any]:
    """See Family.looked: nothing but what all families show."""
    return {}


def described(module: CTRModule, model: IdsSpec, layout: Layout) -> list[str]:
    """See Family.described."""
    title = " ".join((type(model).__doc__ or "").split())
    return [title, f"Behaviours are {', '.join(model.behaviours)}; targets {', '.join(model.target)}."]


def narrowed(name: str) -> bool:
    """See Family.narrowed: these models are small, and stay in fp32."""
    return False
