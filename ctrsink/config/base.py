"""What every section of a configuration shares: frozen, an unknown key is an error, and so is a number that is none."""

from pydantic import BaseModel, ConfigDict

MOST_SEQUENCES = 10**7
"""Of a batch: every rank holds the numbers of its own."""


class Section(BaseModel):
    """A frozen section of the run's configuration; attribute docstrings are its help texts."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)
