"""What every family's section has, and what the rest of a configuration asks it."""

from typing import TYPE_CHECKING, ClassVar, Self

from pydantic import field_validator

from ctrsink.config.base import Section
from ctrsink.config.signals import ColumnName
from ctrsink.features.columns import Column

if TYPE_CHECKING:
    from ctrsink.config.run import RunSpec


class FamilySpec(Section):
    """What the sections of all families share."""

    GROUPS: ClassVar[tuple[str, ...]]
    """Groups of parameters, which stages train by name."""
    OBJECTIVES: ClassVar[tuple[str, ...]] = ("click",)
    """What a stage may train for."""

    base: ColumnName | None = None
    """A column of the log, `log.NAME`, with the logit that the present ranker gave: the model learns what to add to it. An event
    without one has 0. It may be among `target.signals` as well. null: none."""

    @field_validator("base")
    @classmethod
    def _is_logged(cls, value: str | None) -> str | None:
        column = Column.parse(value) if value is not None else None
        if column is not None and (column.kind, column.of) != ("number", "log"):
            raise ValueError(f"{value} is no number of the log: name its column as log.NAME")
        return value

    @property
    def ids(self) -> tuple[str, ...]:
        """Signals that say which item or user it is, and have embeddings in the group `ids`."""
        return ()

    @property
    def absent(self) -> dict[str, str]:
        """Groups that this model has no parameters in, and why."""
        return {}

    def check(self, run: "RunSpec") -> None:
        """Rules between this section and the rest of the run; raises ValueError."""

    def absolute(self) -> Self:
        """The section with local paths that hold in any folder."""
        return self
