"""A batch of text as rows of one length, and a sequence by the names of its columns: what tests look at place by place."""

import dataclasses
from dataclasses import dataclass
from types import SimpleNamespace

import torch

from ctrsink.attention.packed import Packed, Padded
from ctrsink.config.stages import Objective
from ctrsink.families.decoder.model import CTRModel
from ctrsink.sequences.batch import Batch, Targets
from ctrsink.sequences.columns import Sequences


@dataclass(frozen=True)
class PaddedBatch(Padded):
    """Padded, and all else of the batch in the same places: see the columns of `families.decoder.encode`."""

    input_ids: torch.Tensor
    """[B, L], as are position_ids."""
    position_ids: torch.Tensor
    signals: torch.Tensor
    """[B, K, S], as are sink_numbers and sink_times."""
    sink_numbers: torch.Tensor
    sink_times: torch.Tensor
    asked_times: torch.Tensor
    """[B, M], as are asked_signals and asked_numbers."""
    asked_signals: torch.Tensor
    asked_numbers: torch.Tensor
    readout_positions: torch.Tensor
    """[B, T], as are readout_valid, readout_numbers, base and labels."""
    readout_valid: torch.Tensor
    readout_numbers: torch.Tensor
    base: torch.Tensor
    labels: torch.Tensor


def padded(batch: Batch) -> PaddedBatch:
    """The batch padded on the right."""
    packed, read = Packed.of(batch), batch.inputs
    of = Padded.of(packed)
    length = of.kinds.shape[1]
    targets = batch.axes["targets"]
    width = max(1, targets.longest)
    own = read["readout_positions"] - packed.sequences.offsets[targets.owner]
    return PaddedBatch(
        **{field.name: getattr(of, field.name) for field in dataclasses.fields(Padded)},
        **{name: packed.sequences.pad(read[name], length) for name in ("input_ids", "position_ids")},
        **{name: packed.sinks.axis.pad(read[name], packed.sinks.width) for name in ("signals", "sink_numbers", "sink_times")},
        **{name: packed.asked.axis.pad(read[name], packed.asked.width) for name in ASKED},
        readout_positions=targets.pad(own, width, length - 1),
        readout_valid=targets.pad(batch.targets.counted, width),
        readout_numbers=targets.pad(read["readout_numbers"], width),
        base=targets.pad(read["base"], width),
        labels=targets.pad(batch.targets.labels, width),
    )


ASKED = ("asked_times", "asked_signals", "asked_numbers")


def named(sequences: Sequences) -> SimpleNamespace:
    """The columns of one sequence, by name."""
    assert len(sequences) == 1
    return SimpleNamespace(**sequences.columns)


def in_rows(batch: Batch, of_positions: torch.Tensor) -> torch.Tensor:
    """[N, ...] of the batch's positions -> [B, L, ...] as in `padded`, zeros at padding."""
    return batch.axes["positions"].pad(of_positions, Padded.of(Packed.of(batch)).kinds.shape[1])


def of_targets(batch: Batch, values: torch.Tensor) -> torch.Tensor:
    """[T] of the batch's targets -> [B, T] as in `padded`, zeros where there is none."""
    targets = batch.axes["targets"]
    return targets.pad(values, max(1, targets.longest))


def states_of(model: CTRModel, batch: Batch, objective: Objective) -> torch.Tensor:
    """The model's states after the final norm, [B, L, D], zeros at padding."""
    return in_rows(batch, model.hidden_states(batch, Packed.of(batch), objective))


def changed(batch: Batch, **inputs: torch.Tensor) -> Batch:
    """The batch with other inputs of these names."""
    assert inputs.keys() <= batch.inputs.keys()
    return dataclasses.replace(batch, inputs=batch.inputs | inputs)


def same(one: Batch, other: Batch) -> bool:
    """Whether two batches hold the same, bit by bit."""
    assert one.inputs.keys() == other.inputs.keys()
    assert one.axes.keys() == other.axes.keys()
    pairs = [(one.inputs[name], other.inputs[name]) for name in one.inputs]
    pairs += [(one.axes[name].offsets, other.axes[name].offsets) for name in one.axes]
    pairs += [(getattr(one.targets, f.name), getattr(other.targets, f.name)) for f in dataclasses.fields(Targets)]
    counts = [(of.tokens, of.impressions, of.costs, of.units) for of in (one, other)]
    return counts[0] == counts[1] and all(torch.equal(a, b) for a, b in pairs)
