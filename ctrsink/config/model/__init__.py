"""The section `model`: a family, and what that family has to choose."""

from typing import Annotated, Any

from pydantic import BaseModel, Discriminator, Tag

from ctrsink.config.model.decoder import BackboneSpec, BiasSpec, DecoderSpec, LoraSpec, SinkSpec
from ctrsink.config.model.din import DinSpec
from ctrsink.config.model.family import FamilySpec
from ctrsink.config.model.sparse import SparseSpec
from ctrsink.config.model.told import TargetSpec


def _family(value: Any) -> Any:
    """The family that a section names; the first of them where it names none."""
    if isinstance(value, BaseModel):
        return getattr(value, "family", None)
    return value.get("family", "decoder") if isinstance(value, dict) else "decoder"


ModelSpec = Annotated[
    Annotated[DecoderSpec, Tag("decoder")] | Annotated[DinSpec, Tag("din")] | Annotated[SparseSpec, Tag("sparse")],
    Discriminator(_family),
]

__all__ = [
    "BackboneSpec",
    "BiasSpec",
    "DecoderSpec",
    "DinSpec",
    "FamilySpec",
    "LoraSpec",
    "ModelSpec",
    "SinkSpec",
    "SparseSpec",
    "TargetSpec",
]
