"""The family `hstu`; see families.protocol.Family."""

from collections.abc import Callable

from ctrsink.config.model.hstu import HstuSpec
from ctrsink.families.ids.family import IdsFamily
from ctrsink.families.protocol import CTRModule


class HstuFamily(IdsFamily):
    """HSTU (arXiv 2402.17152)."""

    spec = HstuSpec
    padded = True

    def module(self) -> Callable[[HstuSpec], CTRModule]:
        from ctrsink.families.hstu.model import Hstu

        return Hstu


FAMILY = HstuFamily()
