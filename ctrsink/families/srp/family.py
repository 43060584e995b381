"""The family `srp`; see families.protocol.Family."""

from collections.abc import Callable

from ctrsink.config.model.srp import SrpSpec
from ctrsink.families.ids.family import IdsFamily
from ctrsink.families.protocol import CTRModule


class SrpFamily(IdsFamily):
    """SRP4CTR (arXiv 2407.19658)."""

    spec = SrpSpec
    padded = True

    def module(self) -> Callable[[SrpSpec], CTRModule]:
        from ctrsink.families.srp.model import Srp

        return Srp


FAMILY = SrpFamily()
