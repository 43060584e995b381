"""StudySpec: variants of a run over several seeds, and what they are compared with."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ctrsink.config.base import Section

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Baseline = Literal["item_mean", "logistic", "lightgbm"]


class StudySpec(Section):
    """Variants of a run, each with every seed, compared on the same impressions: what `ctrsink study` does."""

    folder: str
    """Folder of the study, local or s3://: a folder for each variant and seed, the comparison, figures. `--to` names another."""
    base: str | None = None
    """Configuration of the run that variants change; like `include`, relative to the study's file."""
    overrides: tuple[str, ...] = ()
    """`section.key=value` for every variant, before its own: the budget, where it runs."""
    variants: dict[Name, tuple[str, ...] | str] = Field(min_length=1)
    """By name: a list of `section.key=value` that change `base` (an empty one: nothing), or the file of another configuration."""
    seeds: tuple[int, ...] = Field(default=(0, 1, 2), min_length=1)
    """Every variant is trained once with each."""
    baselines: tuple[Baseline, ...] = ()
    """What is fitted beside: the smoothed item mean; logistic regression and LightGBM on the columns of `signals`."""
    stacked: tuple[str, ...] = ()
    """Variants whose score LightGBM gets as one more column beside those of `signals`."""
    signals: str | None = None
    """Folder with train.parquet, valid.parquet and test.parquet, such as `ctrsink data signals --to` writes; columns of one's own
    may stand beside. null: the signals of the data set, all that targets can be told."""
    compare_with: str | None = None
    """The variant or baseline that the others are compared with; null: the first variant."""
    split: Literal["valid", "test"] = "test"
    """Split that is compared on."""

    @model_validator(mode="after")
    def _consistent(self) -> "StudySpec":
        if self.base is None and any(not isinstance(variant, str) for variant in self.variants.values()):
            raise ValueError("base is missing: a variant that is a list changes that configuration")
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError("seeds: one stands twice")
        for name in self.stacked:
            if name not in self.variants:
                raise ValueError(f"stacked: there is no variant {name} (allowed: {', '.join(self.variants)})")
        names = self.names
        if len(set(names)) != len(names):
            raise ValueError(f"variants: a name is that of a baseline or stacked variant, too: {', '.join(names)}")
        if self.compare_with is not None and self.compare_with not in names:
            raise ValueError(f"compare_with: there is no {self.compare_with} (allowed: {', '.join(names)})")
        return self

    @property
    def names(self) -> list[str]:
        """Of all that is compared, in the order of the table."""
        return [*self.baselines, *self.variants, *map(stacked_name, self.stacked)]


def stacked_name(variant: str) -> str:
    """What the stacked form of a variant is called."""
    return f"{variant}-stacked"
