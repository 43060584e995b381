"""What a preparation is given, and where what it does lies."""

from dataclasses import dataclass

from ctrsink import __version__, storage
from ctrsink.config.data import PrepareSpec
from ctrsink.dataset.manifest import FORMAT, Manifest
from ctrsink.prepare.execute import Execute


@dataclass(frozen=True)
class Job:
    """A log to be prepared, or to be appended."""

    spec: PrepareSpec
    to: str
    """The data set."""
    work: str
    """Folder of all that is of no use once the data set is there."""
    base: Manifest | None
    """The data set that is appended to; None: there is none."""
    execute: Execute

    @property
    def appended(self) -> bool:
        return self.base is not None

    def folder(self, name: str, *facts: object) -> str:
        """Below the work folder, a name that depends on all that the results there depend on."""
        return storage.join(self.work, f"{name}-{storage.sha256(repr((__version__, FORMAT, facts)).encode())[:16]}")
