"""The family `decoder`; see families.protocol.Family."""

from collections.abc import Callable
from typing import Any, ClassVar

from ctrsink.config import RunSpec
from ctrsink.config.data import DataSpec
from ctrsink.config.stages import Objective
from ctrsink.dataset.layout import Layout
from ctrsink.dataset.manifest import Manifest
from ctrsink.families.decoder.encode import encode
from ctrsink.families.decoder.layout import check, layout
from ctrsink.families.facts import Facts, Wording
from ctrsink.families.protocol import Adapter, CTRModule, Family, Merged, Plain
from ctrsink.sequences.batch import Batch
from ctrsink.sequences.columns import Sequences
from ctrsink.sequences.windows import Cuts


class DecoderFamily(Family):
    """What takes torch and transformers, and so seconds, to import is imported when it is used."""

    target_numbers = ("asked_numbers", "readout_numbers")
    reads_text = True
    earlier_names: ClassVar = {name: name.replace(".", ".categories.", 1) for name in ("sinks.tables.", "sinks.projection.")}

    def layout(self, data: DataSpec, model: Any, manifest: Manifest) -> Layout:
        return layout(data, model, manifest)

    def encode(self, cuts: Cuts, layout: Layout, wording: Wording) -> Sequences:
        return encode(cuts, layout, wording)

    def check(self, run: RunSpec, manifest: Manifest, vocabulary: Callable[[], int]) -> Facts:
        return check(run, manifest, vocabulary)

    def build(self, model: Any, facts: Facts, seed: int, precision: str = "fp32") -> CTRModule:
        from ctrsink.families.decoder.build import build_model

        return build_model(model, facts.vocabulary, seed, precision)

    def rebuilt(self, plain: dict[str, Any], facts: Facts) -> CTRModule:
        from ctrsink.families.decoder.export import rebuilt

        return rebuilt(plain)

    def portable(self, model: Any) -> Any:
        """The backend that every device has."""
        return model.model_copy(update={"attention": "sdpa"})

    def merged(self, module: CTRModule, model: Any) -> Merged:
        from ctrsink.families.decoder.export import merged

        return merged(module, model)

    def adapter(self, module: CTRModule, model: Any) -> Adapter:
        from ctrsink.families.decoder.adapter import adapter

        return adapter(module, model)

    def plain(self, module: CTRModule, model: Any, objective: Objective, padding: int | None) -> Plain:
        from ctrsink.families.decoder.plain import plain

        return plain(module, model, objective, padding)

    def plain_logits(self, folder: str) -> Callable[[Batch], Any]:
        from ctrsink.families.decoder.plain import plain_logits

        return plain_logits(folder)

    def on_base(self, model: Any, path: str | None) -> Any:
        from ctrsink.families.decoder.adapter import on_base

        return on_base(model, path)

    def described(self, module: CTRModule, model: Any, layout: Layout) -> list[str]:
        from ctrsink.families.decoder.export import described

        return described(module, model, layout)

    def looked(self, module: Any, untrained: Callable[[], Any], batches: list[Batch], objective: Objective) -> dict[str, Any]:
        from ctrsink.families.decoder.look import looked

        return looked(module, untrained, batches, objective)

    def narrowed(self, name: str) -> bool:
        """The backbone's; the rest is small, and was trained in fp32."""
        return name.startswith("backbone.")


FAMILY = DecoderFamily()
