"""FLOPs of a step: a behaviour once for its sequence, a candidate for itself; a multiply-add counts as two."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import nn

from ctrsink.config.stages import Objective
from ctrsink.families.ids.module import linear_flops
from ctrsink.families.protocol import Flops
from ctrsink.families.srp.cloze import scored
from ctrsink.sequences.batch import Batch
from ctrsink.sequences.behaviours import BEHAVIOURS
from ctrsink.sequences.columns import TARGETS

if TYPE_CHECKING:
    from ctrsink.families.srp.model import Srp


def counter(model: "Srp", objective: Objective) -> Callable[[Batch], Flops]:
    """See CTRModule.flop_count.

    A part counts once forward, as much again for the way back through it where something in or before it is trained, and as much
    again for its own gradient where it is trained. Look-ups, norms and softmax count as nothing.
    """
    embedding, encoder, spec = model.embedding, model.encoder, model.spec
    cloze = objective.kind == "cloze"
    whole = cloze or model.queries is not None
    layers = spec.layers if whole else spec.layers - 1
    # Tables that targets alone have are trained with what reads them: behaviours are not embedded by these.
    embedded = any(p.requires_grad for name, p in embedding.named_parameters() if model.group_of(f"embedding.{name}") != "cross")
    encoded = embedded or _trained(encoder)
    of_encoder = _times(encoder, embedded)
    last = encoder.blocks[-1]
    unread = linear_flops(last) - (linear_flops(last.remember) if spec.share_keys else 0)  # pyright: ignore[reportArgumentType]
    per_behaviour = linear_flops(encoder) - (0 if whole else unread)
    per_item, per_event = linear_flops(embedding.item), linear_flops(embedding)
    of_embedding = 3 if embedded else 1
    per_pair = 4 * spec.width
    per_masked = {
        g: 2 * spec.embedding_size * (n + spec.width * len(spec.foretold[g])) for g, n in scored(spec, model.cloze.rows).items()
    }

    def count(batch: Batch) -> Flops:
        axis = batch.axes[BEHAVIOURS]
        events = axis.total
        matrices = events * (of_embedding * per_event + of_encoder * per_behaviour)
        attention = of_encoder * layers * per_pair * int((axis.lengths**2).sum())
        if cloze:
            masked = sum(len(batch.inputs[f"masked_{group}"]) * each for group, each in per_masked.items())
            return Flops(matrices + _times(model.cloze, encoded) * masked, attention)
        matrices += of_embedding * per_item * batch.axes[TARGETS].total
        for part in (_cross(model, encoded), _queries(model, encoded), _tower(model, encoded)):
            found = part(batch)
            matrices, attention = matrices + found.matrices, attention + found.attention
        return Flops(matrices, attention)

    return count


def _cross(model: "Srp", encoded: bool) -> Callable[[Batch], Flops]:
    own = sum(linear_flops(block.remember) for block in model.cross.blocks if isinstance(block.remember, nn.Module))
    per_target = linear_flops(model.cross) - own
    times, pairs = _times(model.cross, encoded), 4 * model.spec.width * model.spec.layers

    def count(batch: Batch) -> Flops:
        matrices = batch.axes[BEHAVIOURS].total * own + batch.axes[TARGETS].total * per_target
        return Flops(times * matrices, times * pairs * batch.costs["pairs"])

    return count


def _queries(model: "Srp", encoded: bool) -> Callable[[Batch], Flops]:
    if model.queries is None:
        return lambda batch: Flops(0, 0)
    queries, m = model.queries, model.spec.queries
    per_behaviour = sum(linear_flops(block.behaviours) for block in queries.blocks)  # pyright: ignore[reportArgumentType]
    per_query = linear_flops(queries) - per_behaviour
    times, pairs = _times(queries, encoded), 4 * model.spec.width * model.spec.layers

    def count(batch: Batch) -> Flops:
        events, sequences = batch.axes[BEHAVIOURS].total, len(batch.axes[BEHAVIOURS].lengths)
        matrices = events * per_behaviour + sequences * m * per_query
        return Flops(times * matrices, times * pairs * m * (events + sequences * m))

    return count


def _tower(model: "Srp", encoded: bool) -> Callable[[Batch], Flops]:
    tower = model.tower
    per_sequence = 0 if tower.of_queries is None else linear_flops(tower.of_queries)
    per_target = linear_flops(tower) - per_sequence
    below = encoded or _trained(model.cross) or (model.queries is not None and _trained(model.queries))
    times = _times(tower, below)

    def count(batch: Batch) -> Flops:
        targets = batch.axes[TARGETS]
        return Flops(times * (len(targets.lengths) * per_sequence + targets.total * per_target), 0)

    return count


def _trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _times(module: nn.Module, below: bool) -> int:
    """How often its forward pass counts; `below`: something before it is trained."""
    return 3 if _trained(module) else 2 if below else 1
