"""Objective `cloze`: what fields of behaviours were hidden, from the states that the encoder gives these (arXiv 2407.19658)."""

from functools import partial

import torch
from torch import nn

from ctrsink.config.model.srp import MaskGroup, SrpSpec
from ctrsink.families.ids.embedding import SignalTables, module_key
from ctrsink.families.protocol import Out
from ctrsink.families.srp.fields import MASK_SCALE, Hidden
from ctrsink.families.srp.masks import NEGATIVES, is_sampled
from ctrsink.families.srp.softmax import log_total, sampled_log_total
from ctrsink.features.registry import of_kind
from ctrsink.sequences.batch import Batch


class Cloze(nn.Module):
    """`(W_f state + b_f) . Embedding_f(value) + bias_f(value)`: the score of each value of the field f.

    The tables are those that behaviours are embedded by, as in BERT4Rec (our decision): what is foretold shapes what is read.
    """

    def __init__(self, spec: SrpSpec, rows: dict[str, int]) -> None:
        super().__init__()
        self.foretold = spec.foretold
        self.columns = {name: place for place, name in enumerate(of_kind(spec.behaviours, numbers=False))}
        self.sampled = tuple(name for name in self.columns if is_sampled(spec, name))
        self.rows = {name: rows[name] for name in self.columns}
        self.mask = nn.Embedding(1, spec.width)
        """[MASK] of the group `item`."""
        nn.init.normal_(self.mask.weight, std=MASK_SCALE)
        self.heads = nn.ModuleDict({module_key(name): nn.Linear(spec.width, spec.embedding_size) for name in self.columns})
        self.biases = nn.ModuleDict({module_key(name): nn.Embedding(of, 1) for name, of in self.rows.items()})
        for bias in self.biases.values():
            nn.init.zeros_(bias.weight)  # pyright: ignore[reportArgumentType]

    def hidden(self, batch: Batch) -> Hidden:
        """What the batch hides, see masks.hidden."""
        item, behaviour = batch.inputs["masked_item"], batch.inputs["masked_behaviour"]
        return Hidden(item, behaviour, self.mask(torch.zeros_like(item)))

    def forward(self, states: torch.Tensor, batch: Batch, tables: SignalTables) -> Out:
        """The sum over hidden positions, and fields of what is hidden there, of cross-entropies; states [K, D].

        The tallies count how often the likeliest value was the true one, of fields whose values were all scored; in evaluation of
        every field.
        """
        loss = torch.zeros((), device=states.device)
        tallies: dict[str, torch.Tensor] = {}
        for group, names in self.foretold.items():
            rows = batch.inputs[f"masked_{group}"]
            at, signals = states.index_select(0, rows), batch.inputs["signals"].index_select(0, rows)
            for name in names:
                losses, guess = self._losses(name, at, signals[:, self.columns[name]], batch, tables)
                loss = loss + losses.sum()
                if guess is not None:
                    hits = (guess == signals[:, self.columns[name]]).sum()
                    tallies |= {f"hits/{name}": hits, f"of/{name}": torch.full_like(hits, len(rows))}
        return Out(loss, None, tallies)

    def _losses(
        self, name: str, states: torch.Tensor, truth: torch.Tensor, batch: Batch, tables: SignalTables
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Cross-entropies [M], and the likeliest values, int64 [M], or None where not all were scored."""
        table, bias = tables.table(name), self.biases[module_key(name)]
        vectors = self.heads[module_key(name)](states)
        # The sum over many values is not for bfloat16.
        with torch.autocast(states.device.type, enabled=False):
            vectors = vectors.to(bias.weight.dtype)  # pyright: ignore[reportCallIssue, reportArgumentType]
            own = (vectors * table(truth)).sum(-1) + bias(truth).squeeze(-1)
            score = partial(_scores, vectors, table, bias)
            if self.training and name in self.sampled:
                return sampled_log_total(score, own, truth, batch.inputs[NEGATIVES], self.rows[name]) - own, None
            total, guess = log_total(score, self.rows[name], len(states), states.device)
            return total - own, guess


def _scores(vectors: torch.Tensor, table: nn.Module, bias: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    return vectors @ table(rows).T + bias(rows).squeeze(-1)


def scored(spec: SrpSpec, rows: dict[str, int]) -> dict[MaskGroup, int]:
    """Values that a hidden position of each group is scored for in training, over its fields."""
    counts = {name: spec.negatives if is_sampled(spec, name) else of for name, of in rows.items()}
    return {group: sum(counts[name] for name in names) for group, names in spec.foretold.items()}
