"""Sections that say where the log is, how it becomes a data set and how sequences are cut from it."""

from typing import Any, Literal

from pydantic import Field, model_validator

from ctrsink.config.base import Section
from ctrsink.config.signals import ColumnName
from ctrsink.config.times import Moment
from ctrsink.features.columns import columns_of


class ColumnSpec(Section):
    """Names of the columns of the user's own event log; only `user`, `item` and `timestamp` must exist."""

    user: str = "user"
    """Id of the user, a text or a whole number."""
    item: str = "item"
    """Id of the item, as in the column `item` of the item table."""
    timestamp: str = "timestamp"
    """Seconds since 1970, whole or with a fraction, or dates and times: as text in ISO 8601, in Parquet of their type."""
    feedback: str | None = None
    """A number that says how the user reacted: rating, click, watch ratio."""
    label: str | None = None
    """0 or 1, empty where the event is no impression. Without it the label comes from `feedback` and `positive_from`."""
    request: str | None = None
    """Id shared by the impressions that one user was shown at one moment."""


class SourceSpec(Section):
    """The raw log."""

    kind: Literal["movielens", "kuairec", "mind", "table"] = "movielens"
    """`movielens`, `kuairec`, `mind`: a public data set as published. `table`: a log of one's own."""
    path: str
    """Local or s3://. `movielens`: the folder with the ratings file. `kuairec`: the folder with the matrices, or one of them.
    `mind`: the folder with `behaviors.tsv`, or one of such folders. `table`: the event log (.csv, .jsonl or .parquet), a file or
    a folder of files."""
    items: str | None = None
    """`table` only: the item table, a file or a folder, with a column `item` and the text fields that the template names."""
    columns: ColumnSpec = ColumnSpec()
    """`table` only: what the columns of the event log are called."""
    items_columns: dict[str, str] = Field(default={})
    """`table` only: what columns of the item table are called, by `item` or the name of a field in the template, as
    `{item: sku, title: name}`. Others keep their names."""

    @model_validator(mode="after")
    def _only_tables(self) -> "SourceSpec":
        if self.kind != "table" and (self.items or self.items_columns or self.columns != ColumnSpec()):
            raise ValueError(f"items, columns and items_columns belong to kind table, the source {self.kind} has its own")
        if self.items_columns and not self.items:
            raise ValueError("items_columns names columns of an item table, but items is null")
        return self


class TextSpec(Section):
    """How events are rendered as text: feedback is part of a behaviour, never of a target."""

    item: str = "{title}"
    """Template over the fields of the item table. Control tokens in it are meant, those in fields are letters."""
    feedback: str = " {feedback:g}"
    """Template over the event's feedback; at most 4096 distinct renderings are allowed."""
    separator: str = "\n"
    """Text after a behaviour's feedback."""
    prefix: str = ""
    """Text at the start of every sequence. A BOS token there is not doubled where the tokenizer puts one by itself."""
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


class EncoderSpec(Section):
    """A text encoder that gives every item a vector, once, at preparation; for the signal `similarity`, `data.retrieve` and
    `model.similarity: vectors`.
    """

    path: str
    """Hugging Face id or folder, local or s3://, of an encoder with weights in safetensors; of a sentence-transformers model its
    pooling is used (mean or cls), of another the mean over its tokens."""
    revision: str | None = None
    """Commit or tag of a hub model."""
    max_tokens: int = Field(default=128, ge=3)
    """An item's text is cut to this many of the encoder's tokens, its special ones counted."""


class SplitSpec(Section):
    """Split by global time: the earliest `train` share of impressions, the next `valid`, the rest is test; or at given times."""

    train: float | None = Field(default=0.8, gt=0, lt=1)
    """Share of the impressions; null where times are given."""
    valid: float | None = Field(default=0.1, ge=0, lt=1)
    """Share of the impressions, 0 for none; null where times are given."""
    train_from: Moment | None = None
    """With `train_end`: events before this moment are history only, and no targets. null: there are none. As all moments here a
    date (its midnight in UTC) or time in ISO 8601, or seconds since 1970."""
    train_end: Moment | None = None
    """In place of the shares: where train ends and valid begins; the moment itself belongs to valid."""
    valid_end: Moment | None = None
    """With `train_end`: where valid ends and test begins; the same as `train_end` for no valid range."""

    @model_validator(mode="before")
    @classmethod
    def _times_leave_shares_out(cls, given: Any) -> Any:
        times = ("train_from", "train_end", "valid_end")
        if isinstance(given, dict) and any(given.get(name) is not None for name in times):
            return {"train": None, "valid": None} | given
        return given

    @model_validator(mode="after")
    def _shares_or_times(self) -> "SplitSpec":
        shares, times = (self.train, self.valid), (self.train_end, self.valid_end)
        if times == (None, None) and self.train_from is None:
            if self.train is None or self.valid is None:
                raise ValueError("give both shares, train and valid, or both times, train_end and valid_end")
            if self.train + self.valid >= 1:
                raise ValueError(f"train + valid must be below 1 to leave a test range, got {self.train + self.valid:g}")
        elif shares != (None, None):
            raise ValueError("give either shares or times: with train_end and valid_end, train and valid must be null")
        elif self.train_end is None or self.valid_end is None:
            raise ValueError("train_end and valid_end are needed together (the same for no valid range)")
        elif self.train_end > self.valid_end or (self.train_from is not None and self.train_from >= self.train_end):
            raise ValueError("train_from must lie before train_end, and train_end not behind valid_end")
        return self

    @property
    def shares(self) -> tuple[float, float] | None:
        """`train` and `valid`, or None where times are given."""
        return None if self.train is None or self.valid is None else (self.train, self.valid)

    @property
    def has_valid(self) -> bool:
        """Whether a valid range was asked for."""
        return self.valid != 0 if self.valid is not None else self.train_end != self.valid_end


class FieldSpec(Section):
    """A column of the item table whose values items share: genre, brand, category."""

    column: str
    """Its name."""
    separator: str | None = Field(default=None, min_length=1)
    """What stands between several values of one item; null: the cell is one value."""


class StatisticsSpec(Section):
    """How items were received before each event, counted by period, so that no event knows its own."""

    period: Literal["hour", "day", "week"] = "day"
    """An event knows of an item what was known at the end of the last full period before it."""
    strength: float = Field(default=5.0, gt=0)
    """An item's mean is drawn to that of all items by so many imagined outcomes."""
    user_events: int = Field(default=200, ge=1)
    """A user's statistics are of so many latest events before each event. What the user thought of one of these beyond their own
    level takes as many before it, so a request to score, and `past_events`, need twice as many."""
    fields: tuple[FieldSpec, ...] = ()
    """Columns of the item table for the signal `field_res`."""


class NeighboursSpec(Section):
    """The item-item table of the training range, for `affinity`, `model.similarity` and `data.retrieve_by: neighbours`."""

    partners: int = Field(default=200, ge=1)
    """Partners kept of an item: those with the most users in common."""
    user_events: int = Field(default=1000, ge=1)
    """A user's latest events of the training range that are counted."""
    shrink: float = Field(default=20.0, gt=0)
    """Imagined common users without agreement."""
    by_text: bool = False
    """Items without a partner, new ones above all, take their similarity from texts (`prepare.encoder`): that which pairs of the
    table with such a cosine have on average."""


class PrepareSpec(Section):
    """From the raw log to tokenised shards: what `ctrsink data prepare` does."""

    source: SourceSpec
    text: TextSpec = TextSpec()
    tokenizer: TokenizerSpec
    encoder: EncoderSpec | None = None
    """null: items have no vectors."""
    statistics: StatisticsSpec = StatisticsSpec()
    neighbours: NeighboursSpec | None = None
    """null: items have no neighbours."""
    columns: tuple[ColumnName, ...] = ()
    """Columns of the log and of the item table that models may be told, by the names of their signals: `log.price`, `item.year`
    are numbers, `hashed.log.slot` and `hashed.item.brand` categories, `mean.item.brand` and `count.item.brand` how items of that
    brand were received. What a column of the log says must be known before the answer is."""
    positive_from: float = 4.0
    """Label rule: 1 where feedback is at least this."""
    request_is_second: bool = False
    """For logs without request ids: what one user met within one second is one request, so none of it is history of the rest.
    Otherwise every such event stands alone, and those of one second know one another in the order of the log."""
    split: SplitSpec = SplitSpec()
    duplicates: Literal["keep", "drop"] = "keep"
    """Events that were logged more than once, with the same user, item, time, feedback, label and request: `keep` takes each as
    often as it stands there, `drop` once, as if the others were not in the log."""
    shard_events: int = Field(default=250_000, ge=1)
    """A shard is closed once it holds this many events; a user is never torn apart."""
    past_events: int = Field(default=200, ge=0)
    """`ctrsink data append`: a user's latest events that go into the new shards as history."""
    block_bytes: int = Field(default=32 * 2**20, ge=1)
    """How much of the log one task reads at a time; the data set does not depend on it."""
    workers: int = Field(default=1, ge=1)
    """Tasks at a time: 1 runs them in this process; more let Ray Data run them, on this machine or the cluster at
    `runtime.address`. The data set does not depend on it."""

    @model_validator(mode="after")
    def _texts_have_vectors(self) -> "PrepareSpec":
        if self.neighbours is not None and self.neighbours.by_text and self.encoder is None:
            raise ValueError("neighbours.by_text compares the texts of items: add prepare.encoder")
        return self

    @model_validator(mode="after")
    def _columns_tell_no_answer(self) -> "PrepareSpec":
        if len(set(self.columns)) != len(self.columns):
            raise ValueError("columns: name each once")
        mapped = self.source.columns
        for column in columns_of(self.columns):
            if column.of == "log" and column.name in (mapped.feedback, mapped.label):
                raise ValueError(
                    f"columns: {column.signal} is the answer that is to be foretold; the signal feedback tells it to sinks"
                )
        return self


class CacheSpec(Section):
    """What is kept on local disk, shared by all processes of a node: files of a remote data set, and the users' index of any."""

    dir: str | None = None
    """Local folder; left out, `ctrsink` below $XDG_CACHE_HOME or ~/.cache."""
    limit_mib: int = Field(default=32 * 1024, ge=0)
    """All files together take at most this many MiB: the one used longest ago makes room. 0 turns the cache off."""


class DataSpec(Section):
    """How sequences are cut from a prepared data set."""

    uri: str
    """Folder of the prepared data set, local or s3://."""
    examples: Literal["per_target", "per_request", "per_user"] = "per_target"
    """`per_target`: one sequence per impression. `per_request`: one per request, whose impressions share a history and do not see
    one another; the same results for less work. `per_user`: a user's chronology in pieces, each event a target and then a
    behaviour; the least work, and not the same results."""
    history: int = Field(default=50, ge=0)
    """Behaviours before a sequence's first target, at most."""
    retrieve: int | None = Field(default=None, ge=1)
    """`per_target`: of these behaviours only as many as are most similar to the target, in their order in time (the retrieval of
    CTR-Sink, arXiv 2508.03668). null: all."""
    retrieve_by: Literal["vectors", "neighbours"] = "vectors"
    """What `retrieve` goes by: texts of items (`prepare.encoder`), or what users thought of both (`prepare.neighbours`)."""
    text_history: int | None = Field(default=None, ge=0)
    """Of the behaviours before a sequence's first target only this many latest ones have a text; an older one is its sink alone,
    a single position, so that histories of hundreds of behaviours are cheap. null: all have one. Needs sinks."""
    utc_offset_hours: float = Field(default=0.0, ge=-14, le=14)
    """Added to UTC where a signal tells the hour or the weekday."""
    targets: int = Field(default=32, ge=1)
    """`per_user`: impressions trained in one sequence. `per_request`: impressions that are dealt out together, however many
    requests they are (train.micro_batch_tokens bounds the memory); a longer request is divided."""
    shuffle_shards: int = Field(default=8, ge=1)
    """Sequences are shuffled within blocks of this many shards, which are shuffled themselves."""
    order: Literal["shuffled", "chronological"] = "shuffled"
    """Epochs over all sequences, or one pass over the parts of the data set, oldest first, each shuffled in itself: what is
    appended to the data set continues the run."""
    workers: int = Field(default=0, ge=0)
    """Processes of each rank that build batches ahead; 0 for a thread. The batches are the same."""
    cache: CacheSpec = CacheSpec()

    @model_validator(mode="after")
    def _retrieve_for_a_target(self) -> "DataSpec":
        if self.retrieve is not None and self.examples != "per_target":
            raise ValueError(f"retrieve chooses behaviours for one target: use examples per_target, not {self.examples}, or null")
        if self.retrieve is not None and self.retrieve > self.history:
            raise ValueError(f"retrieve {self.retrieve} is more than history {self.history}, which it chooses from")
        if self.retrieve is None and self.retrieve_by != "vectors":
            raise ValueError(f"retrieve_by {self.retrieve_by} says how behaviours are retrieved, but retrieve is null")
        return self

    @property
    def targets_per_sequence(self) -> int:
        return 1 if self.examples == "per_target" else self.targets
