"""What `cloze` hides, drawn on the host by a hash: no batch, rank or order has a part in it."""

import dataclasses

import numpy as np
import torch

from ctrsink.config.model.srp import MASK_GROUPS, SrpSpec
from ctrsink.features.mix64 import mix64
from ctrsink.features.ragged import ranges
from ctrsink.features.registry import signal
from ctrsink.sequences.batch import Batch
from ctrsink.sequences.behaviours import BEHAVIOURS

NEGATIVES = "negatives"


def is_sampled(spec: SrpSpec, name: str) -> bool:
    """Whether the category is told from a sample of its values in training."""
    return signal(name).hashed and spec.rows > spec.negatives


def masked_rows(users: np.ndarray, events: np.ndarray, lengths: np.ndarray, key: int, group: int, ratio: float) -> np.ndarray:
    """Which behaviours have the fields of a group hidden, bool [K].

    Each is drawn alone, by its sequence and by how many behaviours of it are later.

    Args:
        users: integers [B]; of each sequence.
        events: integers [B]; number of each sequence's first target.
        lengths: int64 [B]; behaviours of each sequence, K in all.
        key: another one draws others.
        group: number of the group; groups are drawn independently.
        ratio: expected share.
    """
    sequence = mix64(mix64(users, key) + events.astype(np.uint64))
    later = lengths.repeat(lengths) - 1 - ranges(np.zeros_like(lengths), lengths)
    drawn = mix64(sequence.repeat(lengths) + later.astype(np.uint64), group)
    return (drawn >> np.uint64(11)) < ratio * 2.0**53


def negatives(rows: int, count: int, key: int) -> np.ndarray:
    """`count` of `rows` numbers, int64 [count], ascending: one of each of as many equal stretches, all as likely."""
    drawn = (mix64(np.arange(count), key) >> np.uint64(11)) / 2.0**53
    return np.minimum(((np.arange(count) + drawn) * (rows / count)).astype(np.int64), rows - 1)


def hidden(batch: Batch, spec: SrpSpec, key: int) -> Batch:
    """The batch with what is hidden: of each group `masked_GROUP`, rows of behaviours, int64 [M]; and, where ids are
    told from a sample, `negatives`, int64 [S].

    Its unit is a behaviour that has a group hidden; one with both hidden counts twice. Sequences that only fill the batch have
    none.
    A group without categories is not hidden: nothing of it could be foretold.

    Args:
        key: the same for all micro-batches and ranks of a step, and another one for the next.
    """
    lengths, firsts = batch.axes[BEHAVIOURS].lengths, batch.axes["targets"].offsets[:-1]
    users, events = batch.targets.users[firsts].numpy(), batch.targets.events[firsts].numpy()
    counted = batch.targets.counted[firsts].numpy().repeat(lengths)
    added: dict[str, np.ndarray] = {}
    for number, group in enumerate(MASK_GROUPS):
        masked = masked_rows(users, events, lengths, key, number, spec.mask_ratio) & counted
        added[f"masked_{group}"] = np.flatnonzero(masked & bool(spec.foretold[group]))
    units = sum(len(rows) for rows in added.values())
    if spec.rows > spec.negatives:
        added[NEGATIVES] = negatives(spec.rows, spec.negatives, key)
    return dataclasses.replace(
        batch, inputs=batch.inputs | {name: torch.from_numpy(rows) for name, rows in added.items()}, units=units
    )
