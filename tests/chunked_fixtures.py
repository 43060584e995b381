"""Attention to a history by its chunks, position by position, as its definition reads; and batches to hold it to."""

import copy
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface

from ctrsink.attention.kinds import PREFIX, SINK
from ctrsink.config.model import SparseSinksSpec
from ctrsink.config.stages import Objective
from ctrsink.dataset.events import UserEvents
from ctrsink.dataset.layout import Layout
from ctrsink.families.decoder.model import CTRModel
from ctrsink.sequences.batch import Batch
from tests.builders import batch_of, layout_of, tiny_model, tiny_spec, told_sequence

FORMS = ("per_target", "per_request", "per_user")
PLAIN = "chunked_by_definition"


def sparse(**changes: Any) -> SparseSinksSpec:
    return SparseSinksSpec(**{"chunks": 4, "transition": 2, "window": 3} | changes)


def a_model(of: SparseSinksSpec, attention: str = "blocks", precision: str = "fp32", **more: Any) -> CTRModel:
    """A tiny model, whose biases have an effect; the same weights for every backend."""
    spec = tiny_spec(attention=attention, **more).model_copy(update={"bias": None, "sparse": of})
    model = tiny_model(type(spec).model_validate(spec.model_dump()), precision=precision)
    generator = torch.Generator().manual_seed(3)
    for part in (model.temporal, model.summaries):
        for parameter in part.parameters():
            parameter.data.normal_(generator=generator)
    return model


def layout(of: SparseSinksSpec, examples: str, **more: Any) -> Layout:
    sizes: dict[str, Any] = {"history": 1000, "targets": 1000, "window": of.window, "chunks": of.chunks}
    return layout_of(examples, **sizes | {"transition": of.transition} | more)


def a_chronology(gaps: Sequence[int], examples: str, targets: int, seed: int = 0) -> tuple[UserEvents, np.ndarray]:
    """One event more than gaps, of which the last are targets: one, or those of one request, or as many behaviours."""
    chance, count = np.random.default_rng(seed), len(gaps) + 1
    asked = np.arange(max(0, count - (1 if examples == "per_target" else targets)), count)
    times = 10**9 + np.append(0, np.cumsum(np.asarray(gaps, np.int64)))
    known = np.where(np.arange(count) >= asked[0], asked[0], np.arange(count)) if examples == "per_request" else None
    labels = chance.integers(0, 2, count).astype(np.int8)
    times = times if known is None else times[known]
    return UserEvents(chance.integers(0, 5, count), chance.integers(0, 3, count), times, labels, known), asked


def a_batch(of: SparseSinksSpec, examples: str, gaps: Sequence[Sequence[int]], targets: int = 3, **more: Any) -> Batch:
    """A sequence for each list of gaps."""
    told = layout(of, examples, **more)
    return batch_of([told_sequence(*a_chronology(one, examples, targets, seed), told) for seed, one in enumerate(gaps)])


def plain_chunks(times: Sequence[int], most: int) -> list[range]:
    """What is seen, cut at its longest gaps, of equal ones at the earlier."""
    gaps = sorted(range(1, len(times)), key=lambda i: (times[i - 1] - times[i], i))
    bounds = [0, *sorted(gaps[: most - 1]), len(times)]
    return [range(a, b) for a, b in pairwise(bounds) if a < b]


def plain_keys(of: SparseSinksSpec, batch: Batch) -> list[tuple[list[int], list[list[int]]]]:
    """Of each position of a batch: the positions that it sees, and the sinks of each chunk whose mean it sees."""
    out = []
    read, offsets = batch.inputs, batch.axes["positions"].offsets.tolist()
    kinds, events = read["kinds"].tolist(), read["event_ids"].tolist()
    when = dict(zip(read["sink_positions"].tolist(), read["sink_times"].tolist(), strict=True))
    for begin, end in pairwise(offsets):
        for row in range(begin, end):
            sinks = [i for i in range(begin, row) if kinds[i] == SINK and events[i] != events[row]]
            chunks = [[sinks[i] for i in chunk] for chunk in plain_chunks([when[i] for i in sinks], of.chunks)]
            ends = {sink for chunk in chunks for sink in chunk[-of.transition :]}
            own = {i for i in range(begin, row + 1) if kinds[i] == PREFIX or events[i] == events[row]}
            out.append((sorted(own | ends | set(sinks[-of.window :])), chunks))
    return out


def by_definition(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, scaling: float, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """One softmax for each position, over the keys that it sees."""
    given, layer = kwargs["attention_inputs"], module.layer_idx
    given.followed.add(layer)
    key, value = (of[0].repeat_interleave(query.shape[1] // of.shape[1], 0) for of in (key, value))
    packed = given.packed
    asked, sinks = (dict(zip(of.positions.tolist(), of.axis.place.tolist(), strict=True)) for of in (packed.asked, packed.sinks))
    owner, out = packed.sequences.owner.tolist(), []
    for row, (seen, chunks) in enumerate(module.plain_keys):
        keys = torch.cat([key[:, seen], *(key[:, chunk].mean(1, keepdim=True) for chunk in chunks)], 1)
        values = torch.cat([value[:, seen], *(value[:, chunk].mean(1, keepdim=True) for chunk in chunks)], 1)
        scores = torch.einsum("hd,hkd->hk", query[0, :, row], keys) * scaling
        if layer in given.at_means:
            scores = scores + given.at_means[layer][:, None] * (torch.arange(keys.shape[1]) >= len(seen))
        if layer in given.at_asked and row in asked:
            own = given.at_asked[layer][owner[row], :, asked[row]]
            columns = [own[:, sinks[i]] if i in sinks else torch.zeros(len(own)) for i in seen]
            scores = scores + torch.stack(columns + [torch.zeros(len(own))] * len(chunks), 1)
        weights = scores.softmax(-1)
        module.paid[row] = (seen, chunks, weights.mean(0).tolist())
        out.append(torch.einsum("hk,hkd->hd", weights, values))
    return torch.stack(out)[None], None


AttentionInterface.register(PLAIN, by_definition)


def as_defined(model: CTRModel, batch: Batch) -> CTRModel:
    """The same model, which computes this batch position by position."""
    assert model.sparse is not None
    plain = copy.deepcopy(model)
    plain.backbone.config._attn_implementation = PLAIN  # pyright: ignore[reportAttributeAccessIssue]
    keys = plain_keys(model.sparse, batch)
    for layer in plain.backbone.layers:  # pyright: ignore[reportGeneralTypeIssues]
        layer.self_attn.plain_keys, layer.self_attn.paid = keys, {}
    return plain


def run(model: CTRModel, batch: Batch, objective: Objective) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits, and the gradients of the loss."""
    model.zero_grad(set_to_none=True)
    out = model(batch, objective)
    out.loss.backward()
    assert out.logits is not None
    return out.logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
