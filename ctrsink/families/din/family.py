"""The family `din`; see families.protocol.Family."""

from collections.abc import Callable

from ctrsink.config.model.din import DinSpec
from ctrsink.families.ids.family import IdsFamily
from ctrsink.families.protocol import CTRModule


class DinFamily(IdsFamily):
    """DIN (arXiv 1706.06978)."""

    spec = DinSpec

    def module(self) -> Callable[[DinSpec], CTRModule]:
        from ctrsink.families.din.model import Din

        return Din


FAMILY = DinFamily()
