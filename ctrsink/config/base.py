"""What every section of a configuration shares: frozen, and an unknown key is an error."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A frozen section of the run's configuration; attribute docstrings are its help texts."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
