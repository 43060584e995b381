"""Sections that say where the log is, how it becomes a data set and how sequences are cut from it."""

from typing import Literal

from pydantic import Field, model_validator

from ctrsink.config.base import Section

Signal = Literal["recency_rank", "time_gap", "previous_gap", "random", "none"]
TARGET_DEPENDENT_SIGNALS: frozenset[str] = frozenset({"recency_rank", "time_gap"})


class ColumnSpec(Section):
    """Names of the columns of the user's own event log; only `user`, `item` and `timestamp` must exist."""

    user: str = "user"
    """Id of the user; a number is read as text."""
    item: str = "item"
    """Id of the item, as in the column `item` of the item table."""
    timestamp: str = "timestamp"
    """Seconds since 1970, as integer or float; a Parquet timestamp column is converted."""
    feedback: str | None = None
    """A number that says how the user reacted: rating, click, watch ratio."""
    label: str | None = None
    """0 or 1, empty where the event is no impression. Without it the label comes from `feedback` and `positive_from`."""
    request: str | None = None
    """Id shared by the impressions that one user was shown at one moment."""


class SourceSpec(Section):
    """The raw log."""

    kind: Literal["movielens", "table"] = "movielens"
    """`movielens`: MovieLens-100K or 1M as published. `table`: a log of one's own."""
    path: str
    """`movielens`: the folder with the ratings file. `table`: the event log (.csv, .jsonl or .parquet), local or s3://."""
    items: str | None = None
    """`table` only: the item table, with a column `item` and the text fields that the template names."""
    columns: ColumnSpec = ColumnSpec()


class TextSpec(Section):
    """How events are rendered as text: feedback is part of a behaviour, never of a target."""

    item: str = "{title}"
    """Template over the fields of the item table."""
    feedback: str = " {feedback:g}"
    """Template over the event's feedback; at most 4096 distinct renderings are allowed."""
    separator: str = "\n"
    """Text after a behaviour's feedback."""
    prefix: str = ""
    """Text at the start of every sequence."""
    max_item_tokens: int = Field(default=64, ge=1)
    """An item's text is cut to this many tokens."""


class TokenizerSpec(Section):
    """Exactly one of `path` (that of a pretrained model) and `train_vocabulary` (a byte-level BPE trained on the items)."""

    path: str | None = None
    """Hugging Face id or folder, local or s3://, of the pretrained model that is to be trained."""
    train_vocabulary: int | None = Field(default=None, ge=300)
    """Entries of a byte-level BPE that is trained on the texts of items and feedback."""

    @model_validator(mode="after")
    def _one(self) -> "TokenizerSpec":
        if (self.path is None) == (self.train_vocabulary is None):
            raise ValueError("give exactly one of path and train_vocabulary")
        return self


class SplitSpec(Section):
    """Split by global time: the earliest `train` share of impressions, the next `valid`, the rest is test."""

    train: float = Field(default=0.8, gt=0, lt=1)
    """Share of the impressions."""
    valid: float = Field(default=0.1, ge=0, lt=1)
    """Share of the impressions; 0 for none."""

    @model_validator(mode="after")
    def _sum(self) -> "SplitSpec":
        if self.train + self.valid >= 1:
            raise ValueError(f"train + valid must be below 1 to leave a test range, got {self.train + self.valid:g}")
        return self


class PrepareSpec(Section):
    """From the raw log to tokenised shards: what `ctrsink data prepare` does."""

    source: SourceSpec
    text: TextSpec = TextSpec()
    tokenizer: TokenizerSpec
    positive_from: float = 4.0
    """Label rule: 1 where feedback is at least this."""
    split: SplitSpec = SplitSpec()
    shard_events: int = Field(default=250_000, ge=1)
    """A shard is closed once it holds this many events; a user is never torn apart."""


class DataSpec(Section):
    """How sequences are cut from a prepared data set."""

    uri: str
    """Folder of the prepared data set, local or s3://."""
    examples: Literal["per_target", "per_user"] = "per_target"
    """One sequence per impression, or a user's chronology in pieces of `targets` impressions."""
    history: int = Field(default=50, ge=0)
    """Behaviours before a sequence's first target, at most."""
    targets: int = Field(default=32, ge=1)
    """`per_user`: impressions trained in one sequence."""
    shuffle_shards: int = Field(default=8, ge=1)
    """Sequences are shuffled within blocks of this many shards, which are shuffled themselves."""

    @property
    def targets_per_sequence(self) -> int:
        return self.targets if self.examples == "per_user" else 1
