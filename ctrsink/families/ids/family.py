"""What the families have in common that read ids and signals, and no text."""

import logging
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

from ctrsink.config import RunSpec
from ctrsink.config.data import DataSpec
from ctrsink.config.model.ids import IdsSpec
from ctrsink.dataset.layout import Layout, require_signals, scales_of
from ctrsink.dataset.manifest import Manifest
from ctrsink.families.facts import Facts, Wording
from ctrsink.families.foresee import foreseen
from ctrsink.families.parameters import stored
from ctrsink.families.protocol import CTRModule, Family, Merged
from ctrsink.features.registry import of_kind
from ctrsink.sequences import behaviours
from ctrsink.sequences.columns import Sequences
from ctrsink.sequences.windows import Cuts

log = logging.getLogger("ctrsink.train")


class IdsFamily(Family):
    """A family is its section and its module; these models are small, and stay in fp32 when they are exported."""

    target_numbers = ("target_numbers",)
    reads_text = False
    spec: ClassVar[type[IdsSpec]]
    padded: ClassVar[bool] = False
    """Whether the module pads the sequences of a batch to one length."""

    @abstractmethod
    def module(self) -> Callable[[Any], CTRModule]:
        """The module's class, of a section; it is imported when it is used."""

    def layout(self, data: DataSpec, model: Any, manifest: Manifest) -> Layout:
        names = (*model.behaviours, *model.target, *((model.base,) if model.base else ()))
        require_signals(data.uri, manifest, names, "model", model.buckets)
        numbers, target_numbers = (of_kind(side, numbers=True) for side in (model.behaviours, model.target))
        found = Layout(
            family=model.family,
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

    def encode(self, cuts: Cuts, layout: Layout, wording: Wording) -> Sequences:
        return replace(behaviours.encode(cuts, layout), padded=self.padded)

    def check(self, run: RunSpec, manifest: Manifest, vocabulary: Callable[[], int]) -> Facts:
        model: Any = run.model
        if "item_id" in model.ids and manifest.item_count >= model.rows:
            log.warning(
                "model.rows %d: some of the %d items of %s share an embedding of item_id; from rows %d on none does",
                model.rows, manifest.item_count, run.data.uri, manifest.item_count + 1,
            )  # fmt: skip
        foreseen(run, self.layout(run.data, model, manifest), manifest, None)
        return Facts(vocabulary())

    def build(self, model: Any, facts: Facts, seed: int, precision: str = "fp32") -> CTRModule:
        from ctrsink.families.ids.module import seeded

        return seeded(lambda: self.module()(model), seed, precision)

    def rebuilt(self, plain: dict[str, Any], facts: Facts) -> CTRModule:
        from ctrsink.families.ids.module import settled

        return settled(self.build(self.spec.model_validate(plain), facts, 0))

    def merged(self, module: Any, model: Any) -> Merged:
        """Sharded tables become whole ones, and rows that training never met the unknown."""
        module.embedding.settle()
        module.embedding.unshard()
        return Merged(model.model_copy(update={"id_tables": "dense"}).model_dump(mode="json"), stored(module), 0)

    def described(self, module: CTRModule, model: Any, layout: Layout) -> list[str]:
        title = " ".join((self.spec.__doc__ or "").split())
        return [title, f"Behaviours are {', '.join(model.behaviours)}; targets {', '.join(model.target)}."]
