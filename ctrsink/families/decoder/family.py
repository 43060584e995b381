"""The functions of the family `decoder`; see families.protocol.Family."""

from collections.abc import Callable
from typing import Any

from ctrsink.config.model import DecoderSpec
from ctrsink.config.stages import Objective
from ctrsink.dataset.layout import Layout
from ctrsink.families.decoder.encode import encode
from ctrsink.families.decoder.layout import check, layout
from ctrsink.families.facts import Facts
from ctrsink.families.protocol import CTRModule
from ctrsink.sequences.batch import Batch

GROUPS = DecoderSpec.GROUPS
TARGET_NUMBERS = ("asked_numbers", "readout_numbers")


def build(model: DecoderSpec, facts: Facts, seed: int, precision: str = "fp32") -> CTRModule:
    """See Family.build."""
    from ctrsink.families.decoder.build import build_model

    return build_model(model, facts.vocabulary, seed, precision)


def rebuilt(plain: dict[str, Any], facts: Facts) -> CTRModule:
    """See Family.rebuilt."""
    from ctrsink.families.decoder.export import rebuilt

    return rebuilt(plain)


def portable(model: DecoderSpec) -> DecoderSpec:
    """See Family.portable: the backend that every device has."""
    return model.model_copy(update={"attention": "sdpa"})


def merged(module: CTRModule, model: DecoderSpec) -> tuple[dict[str, Any], int]:
    """See Family.merged."""
    from ctrsink.families.decoder.export import merged

    return merged(module, model)


def described(module: CTRModule, model: DecoderSpec, layout: Layout) -> list[str]:
    """See Family.described."""
    from ctrsink.families.decoder.export import described

    return described(module, model, layout)


def looked(module: Any, untrained: Callable[[], Any], batches: list[Batch], objective: Objective) -> dict[str, Any]:
    """See Family.looked."""
    from ctrsink.families.decoder.look import looked

    return looked(module, untrained, batches, objective)


def narrowed(name: str) -> bool:
    """See Family.narrowed: the backbone's; the rest is small, and was trained in fp32."""
    return name.startswith("backbone.")


__all__ = [
    "GROUPS", "TARGET_NUMBERS", "build", "check", "described", "encode", "layout", "looked", "merged", "narrowed", "portable",
    "rebuilt",
]  # fmt: skip
