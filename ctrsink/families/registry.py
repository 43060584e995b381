"""Which families there are; a family's package is imported when it is used."""

import importlib
from functools import lru_cache
from typing import cast

from ctrsink.families.protocol import Family

FAMILIES = ("decoder", "din", "sparse")


@lru_cache
def family_of(name: str) -> Family:
    """The family of that name, as `model.family` has it."""
    assert name in FAMILIES
    return cast(Family, importlib.import_module(f"ctrsink.families.{name}"))
