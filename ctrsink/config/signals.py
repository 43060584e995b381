"""Names of signals in a configuration: those of the registry."""

import difflib
from typing import Annotated

from pydantic import AfterValidator

from ctrsink.features.registry import SIGNALS


def _known(name: str) -> str:
    if name not in SIGNALS:
        near = difflib.get_close_matches(name, SIGNALS, n=1, cutoff=0.5)
        hint = f", did you mean {near[0]}?" if near else ""
        raise ValueError(f"there is no signal {name!r}{hint} (allowed: {', '.join(SIGNALS)})")
    return name


SignalName = Annotated[str, AfterValidator(_known)]
