"""Names of signals in a configuration: those of the registry."""

from typing import Annotated

from pydantic import AfterValidator

from ctrsink.config.tree import shown
from ctrsink.errors import did_you_mean
from ctrsink.features.registry import SIGNALS


def _known(name: str) -> str:
    if name not in SIGNALS:
        raise ValueError(f"there is no signal {shown(name)}{did_you_mean(name[:60], SIGNALS)} (allowed: {', '.join(SIGNALS)})")
    return name


SignalName = Annotated[str, AfterValidator(_known)]
