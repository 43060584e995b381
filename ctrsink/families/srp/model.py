"""The network of SRP4CTR (arXiv 2407.19658): an encoder of behaviours, candidates and queries that read it, a tower."""

from collections.abc import Callable

import torch

from ctrsink.config.model.srp import SrpSpec
from ctrsink.config.stages import Objective
from ctrsink.families.ids.embedding import module_key
from ctrsink.families.ids.module import IdsModule
from ctrsink.families.protocol import Flops, Out
from ctrsink.families.srp.candidate import Cross
from ctrsink.families.srp.cloze import Cloze
from ctrsink.families.srp.cost import counter
from ctrsink.families.srp.encoder import Encoder
from ctrsink.families.srp.fields import FieldEmbedding
from ctrsink.families.srp.masks import hidden
from ctrsink.families.srp.queries import Queries
from ctrsink.families.srp.tower import Tower
from ctrsink.features.registry import signal
from ctrsink.sequences.batch import Batch
from ctrsink.sequences.behaviours import BEHAVIOURS
from ctrsink.sequences.columns import TARGETS


class Srp(IdsModule):
    """`cloze` uses embedding, encoder and cloze, `click` all but cloze. What the targets of a sequence share is computed once."""

    def __init__(self, spec: SrpSpec) -> None:
        super().__init__()
        self.spec = spec
        self.embedding = FieldEmbedding(spec)
        self.encoder = Encoder(spec)
        self.cross = Cross(spec, self.embedding.beside_width)
        self.queries = Queries(spec) if spec.queries else None
        self.tower = Tower(spec, len(self.embedding.asked_numbers))
        self.cloze = Cloze(spec, self.embedding.rows)

    def forward(self, batch: Batch, objective: Objective) -> Out:
        if objective.kind == "click":
            return super().forward(batch, objective)
        with torch.autocast(batch.device.type, torch.bfloat16, enabled=self.mixed_precision):
            states, _ = self.encoder(self._embedded(batch, masked=True), batch.axes[BEHAVIOURS], whole=True)
            return self.cloze(states, batch, self.embedding)

    def logits(self, batch: Batch, objective: Objective) -> torch.Tensor:
        inputs, behaviours, targets = batch.inputs, batch.axes[BEHAVIOURS], batch.axes[TARGETS]
        states, reads = self.encoder(self._embedded(batch, masked=False), behaviours, whole=self.queries is not None)
        items, beside = self.embedding.candidates(inputs["target_signals"], inputs["target_numbers"])
        candidates = self.cross(items, beside, reads, behaviours, targets)
        queries = None if self.queries is None else self.queries(states, behaviours)
        return self.tower(candidates, inputs["target_numbers"], queries, targets)

    def _embedded(self, batch: Batch, masked: bool) -> torch.Tensor:
        found = self.cloze.hidden(batch) if masked else None
        return self.embedding.behaviours(batch.inputs["signals"], batch.inputs["numbers"], found)

    def drawn(self, batch: Batch, objective: Objective, key: int) -> Batch:
        return hidden(batch, self.spec, key) if objective.kind == "cloze" else batch

    def group_of(self, name: str) -> str:
        if name.startswith(self._of_targets):  # pre-training reads no table that targets alone have
            return "cross"
        return "ids" if ".ids." in name else name.split(".")[0]

    def trained_as(self, name: str, trainable: tuple[str, ...]) -> str | None:
        """As CTRModule; None also for the encoder's last states, which without queries `click` does not read: ZeRO would wait."""
        if "cloze" not in trainable and name.startswith(self._of_last_states):
            return None
        return super().trained_as(name, trainable)

    @property
    def _of_targets(self) -> tuple[str, ...]:
        names = (name for name in self.spec.categories if name not in self.spec.behaviours)
        return tuple(f"embedding.{'ids' if signal(n).identity else 'tables'}.{module_key(n)}." for n in names)

    @property
    def _of_last_states(self) -> tuple[str, ...]:
        if self.spec.queries:
            return ()
        parts = ("attend", "feed") if self.spec.share_keys else ("attend", "feed", "remember")
        return ("encoder.norm.", *(f"encoder.blocks.{self.spec.layers - 1}.{part}." for part in parts))

    def decays(self, name: str, dimensions: int) -> bool:
        # Vectors in the form of tables.
        return super().decays(name, dimensions) and not name.startswith(("queries.start", "cloze.biases", "embedding.mask"))

    def flop_count(self, objective: Objective) -> Callable[[Batch], Flops]:
        return counter(self, objective)
