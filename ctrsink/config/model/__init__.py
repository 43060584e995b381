"""The section `model`: a family, and what that family has to choose."""

from typing import Annotated, Any

from pydantic import BaseModel, Discriminator, Tag

from ctrsink.config.model.decoder import BackboneSpec, BiasSpec, DecoderSpec, LoraSpec, SinkSpec, SparseSinksSpec
from ctrsink.config.model.din import DinSpec
from ctrsink.config.model.family import FamilySpec
from ctrsink.config.model.hstu import HstuSpec
from ctrsink.config.model.sparse import SparseSpec
from ctrsink.config.model.srp import SrpSpec
from ctrsink.config.model.told import TargetSpec

FIRST_FAMILY = "decoder"
"""That of a section which names none."""


def _family(value: Any) -> Any:
    """The family that a section names; the first of them where it names none."""
    if isinstance(value, BaseModel):
        return getattr(value, "family", None)
    family = value.get("family", FIRST_FAMILY) if isinstance(value, dict) else FIRST_FAMILY
    return "null" if family is None else family  # of None pydantic would tell the name of this function


ModelSpec = Annotated[
    Annotated[DecoderSpec, Tag("decoder")]
    | Annotated[DinSpec, Tag("din")]
    | Annotated[HstuSpec, Tag("hstu")]
    | Annotated[SparseSpec, Tag("sparse")]
    | Annotated[SrpSpec, Tag("srp")],
    Discriminator(_family),
]

__all__ = [
    "FIRST_FAMILY",
    "BackboneSpec",
    "BiasSpec",
    "DecoderSpec",
    "DinSpec",
    "FamilySpec",
    "HstuSpec",
    "LoraSpec",
    "ModelSpec",
    "SinkSpec",
    "SparseSinksSpec",
    "SparseSpec",
    "SrpSpec",
    "TargetSpec",
]
