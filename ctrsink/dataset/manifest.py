"""The manifest: what is in a prepared data set, with the hash of every file; it is written last."""

import json
import os
from typing import Any, Literal

import pyarrow as pa
from pydantic import ValidationError, field_validator

from ctrsink import storage
from ctrsink.config.base import Section
from ctrsink.config.data import FieldSpec, TextSpec
from ctrsink.config.explain import explain
from ctrsink.config.train import Split
from ctrsink.errors import InputError, first_line
from ctrsink.features.columns import Column, columns_of

MANIFEST_NAME = "manifest.json"
FORMAT = "ctrsink-dataset/3"
WORK = "_work"  # beside the manifest, until it is written: what a preparation keeps to go on if it is interrupted
_READS = 3  # before a file is called damaged: it may have been damaged on its way

SPLITS: tuple[Split, ...] = ("train", "valid", "test")

# A row is one user's chronology; the lists run over its events, oldest first.
SHARD_SCHEMA = pa.schema(
    [
        ("user", pa.string()),
        ("item", pa.list_(pa.int32())),  # row of the item table
        ("timestamp", pa.list_(pa.int64())),  # seconds since 1970
        ("feedback", pa.list_(pa.float32())),  # as logged, null where there was none
        ("feedback_id", pa.list_(pa.int16())),  # row of Manifest.feedback_tokens
        ("label", pa.list_(pa.int8())),  # 0, 1, or null where the event is no impression
        ("request", pa.list_(pa.string())),
        (
            "item_mean",
            pa.list_(pa.float32()),
        ),  # of the item's outcomes as of the last full period before, null where none was known
        ("item_count", pa.list_(pa.int32())),  # outcomes that the mean is of
    ]
)
# The token sidecar of a shard: just the items that the shard mentions, by item.
TOKENS_SCHEMA = pa.schema([("item", pa.int32()), ("tokens", pa.list_(pa.int32())), ("fields", pa.list_(pa.int64()))])
VECTOR = "vector"
# One row per chronology, in shard order: enough to know every sequence of an epoch without opening a shard.
# Events and impressions (events with a label) are counted per split; a user's splits follow each other in time. Before them lie
# `past_events`, there as history only: in a part that was appended, the user's latest events of earlier parts, which are those
# older than the part's `first_time`; behind them the part's own that are older than `train_from`.
INDEX_SCHEMA = pa.schema(
    [("shard", pa.int32()), ("row", pa.int32()), ("past_events", pa.int32())]
    + [(f"{split}_{what}", pa.int32()) for what in ("events", "impressions") for split in ("train", "valid", "test")]
)


class FileEntry(Section):
    """One file of the data set, by its path below the manifest's folder."""

    path: str
    bytes: int
    sha256: str

    @field_validator("path")
    @classmethod
    def _below(cls, path: str) -> str:
        if storage.leads_out(path):
            raise ValueError(f"{path[:200]!r} is no path below the data set")
        return path


class EncoderEntry(Section):
    """The encoder that gave every item a vector; it lies in the data set, for what is appended and for exported models."""

    files: tuple[FileEntry, ...]
    max_tokens: int
    fingerprint: str
    """Of the files and `max_tokens`, see encoder.fingerprint."""
    width: int
    """Numbers of a vector."""
    vectors: FileEntry
    """Parquet with the `vector` of every item, in the order of the item table; shards carry those they mention."""


class StatisticsEntry(Section):
    """How items were received, by period, up to the end of the log; see PrepareSpec.statistics."""

    period_s: int
    strength: float
    user_events: int
    """Window of a user's statistics."""
    outcome: Literal["feedback", "label"]
    """What is averaged."""
    fields: tuple[FieldSpec, ...]
    last_period: int
    """That of the newest event; the file keeps it apart, because what is appended may lie in it too."""
    file: FileEntry
    """Parquet, see `ctrsink.prepare.statistics`: what `append` goes on from and exported models carry."""


class NeighboursEntry(Section):
    """The item-item table, see `ctrsink.features.neighbours`; that of the first part, which later ones only read."""

    file: FileEntry
    """Parquet with a row per item: `partners`, `products` and `common`, lists."""
    variance: float
    shrink: float
    until: int
    """Events before this time were counted, in seconds since 1970."""
    user_events: int
    """Of each user the latest so many of them."""


class Scale(Section):
    """A number over the events of the training range."""

    mean: float
    deviation: float


class ShardEntry(Section):
    """A shard and its token sidecar."""

    part: int
    """Number of the part that it belongs to."""
    prefixes: tuple[int, int]
    """Its users are those of the part whose prefix, the first 16 bits of the sha256 of their id, is in [first, end)."""
    users: int
    events: int
    """Those of earlier parts not counted."""
    duplicates: int = 0
    """Events with all the values of another one."""
    events_file: FileEntry
    tokens_file: FileEntry
    shared: int | None = None
    """Impressions behind another event of their request; None in a data set from before that was counted, as is the next."""
    longest: tuple[int, ...] | None = None
    """Item tokens of 1, 2, 4, ... events of one user in a row, at most, up to a user's whole chronology."""


class SplitTimes(Section):
    """An event at `t` belongs to train if t < train_end, to valid if t < valid_end, else to test; if t < train_from, to none."""

    train_from: int | None = None
    train_end: int
    valid_end: int


class SplitCounts(Section):
    """Impressions of a split and how many of them are positive."""

    impressions: int
    positives: int


class PartEntry(Section):
    """What one preparation brought: part 0 is the first log, each later one was appended and is newer than all before it."""

    split_times: SplitTimes
    splits: dict[Split, SplitCounts]
    users: int
    """Chronologies; a user may have one in several parts."""
    events: int
    first_time: int
    last_time: int
    """Seconds since 1970 of the oldest and the newest event."""
    skipped_rows: int
    duplicates: int = 0
    """Events with all the values of another one: they are there as often as they were logged, if they were not dropped."""
    duplicates_dropped: bool = False
    past_events: int
    """Latest events of earlier parts that a user has at most, before their own; 0 in part 0."""


class Manifest(Section):
    """Everything a reader must know of a data set before it opens a shard."""

    format: Literal["ctrsink-dataset/3"]
    parts: tuple[PartEntry, ...]
    shards: tuple[ShardEntry, ...]
    """Part after part."""
    index: FileEntry
    items: FileEntry
    """Parquet with a row per item: `id`, its text fields, and `text`, the rendered template."""
    tokenizer: tuple[FileEntry, ...]
    tokenizer_fingerprint: str
    encoder: EncoderEntry | None = None
    statistics: StatisticsEntry
    neighbours: NeighboursEntry | None = None
    columns: tuple[str, ...] = ()
    """Signals that are columns, see PrepareSpec.columns."""
    text_line: tuple[float, float] | None = None
    """Intercept and slope of similarity by neighbours over the cosine of texts; see NeighboursSpec.by_text."""
    numbers: dict[str, Scale]
    """The signals that are numbers, those that this data set has what they need for."""
    text: TextSpec
    positive_from: float
    labelled: bool
    """Labels are a column of the log; else they follow from the feedback and `positive_from`."""
    request_is_second: bool
    """What one user met within a second is one request, where the log names none."""
    prefix_tokens: tuple[int, ...]
    feedback_texts: tuple[str, ...]
    """What follows a behaviour's item text (feedback, then separator), by `feedback_id`."""
    feedback_tokens: tuple[tuple[int, ...], ...]
    item_count: int

    @property
    def shard_schema(self) -> pa.Schema:
        """That of the shards."""
        return shard_schema(self.columns)

    @property
    def tokens_schema(self) -> pa.Schema:
        """That of the token sidecars."""
        return tokens_schema(self.columns, None if self.encoder is None else self.encoder.width)

    @property
    def common_files(self) -> tuple[FileEntry, ...]:
        """Those that belong to no shard."""
        encoder = () if self.encoder is None else (*self.encoder.files, self.encoder.vectors)
        neighbours = () if self.neighbours is None else (self.neighbours.file,)
        return (self.index, self.items, *self.tokenizer, *encoder, self.statistics.file, *neighbours)

    @property
    def split_times(self) -> SplitTimes:
        """Those of the newest part."""
        return self.parts[-1].split_times

    @property
    def splits(self) -> dict[Split, SplitCounts]:
        """Summed over the parts."""
        return {
            name: SplitCounts(
                impressions=sum(part.splits[name].impressions for part in self.parts),
                positives=sum(part.splits[name].positives for part in self.parts),
            )
            for name in SPLITS
        }

    @property
    def users(self) -> int:
        """Chronologies: rows of the index."""
        return sum(part.users for part in self.parts)

    @property
    def people(self) -> str:
        """In words, how many chronologies there are; those of several parts are of fewer users, who may have one in each."""
        parts = len(self.parts)
        return f"{self.users:,} users" if parts == 1 else f"{self.users:,} chronologies in {parts} parts"

    @property
    def events(self) -> int:
        return sum(part.events for part in self.parts)

    @property
    def skipped_rows(self) -> int:
        return sum(part.skipped_rows for part in self.parts)

    @property
    def identity(self) -> str:
        """A hash that is equal for data sets of equal content, wherever they lie."""
        return self.identities[-1]

    @property
    def identities(self) -> tuple[str, ...]:
        """The identity that the data set had when it ended with each of its parts: appending adds one and keeps the others."""
        fixed = self.model_dump_json(
            include={"tokenizer_fingerprint", "text", "positive_from", "prefix_tokens", "neighbours", "numbers"}
        )
        found: list[str] = []
        for number, part in enumerate(self.parts):
            # Without defaults: what a field of a later version says of a data set from before it, which keeps its identity.
            shards = [shard.model_dump_json(exclude_defaults=True) for shard in self.shards if shard.part == number]
            this = part.model_dump_json(exclude_defaults=True)
            found.append(storage.sha256("\n".join([*found[-1:], fixed, this, *shards]).encode()))
        return tuple(found)


_TYPES = {"number": pa.float32(), "hashed": pa.string(), "mean": pa.float32(), "count": pa.int32()}


def column_field(column: Column) -> pa.Field:
    """Of the values of a column that is a signal, null where unknown."""
    return pa.field(column.signal, _TYPES[column.kind])


def shard_schema(columns: tuple[str, ...]) -> pa.Schema:
    """SHARD_SCHEMA, and behind it the columns that each event has a value of its own of."""
    own = (column_field(column) for column in columns_of(columns) if column.by_event)
    return pa.schema([*SHARD_SCHEMA, *(pa.field(field.name, pa.list_(field.type)) for field in own)])


def tokens_schema(columns: tuple[str, ...], width: int | None) -> pa.Schema:
    """TOKENS_SCHEMA, behind it the columns that each item has a value of, and VECTOR: `width` float16, little-endian."""
    own = [column_field(column) for column in columns_of(columns) if not column.by_event]
    return pa.schema([*TOKENS_SCHEMA, *own, *([pa.field(VECTOR, pa.binary(2 * width))] if width is not None else [])])


def read_manifest(uri: str) -> Manifest:
    """Read the manifest of the data set in the folder `uri`.

    Raises:
        InputError: there is none, or it is damaged.
    """
    if not storage.is_remote(uri) and os.path.isfile(storage.local_path(uri)):  # noqa: PTH113 - no error where it is too long
        raise InputError(f"{uri} is a file and no prepared data set: name the folder that `ctrsink data prepare` wrote")
    path = storage.join(uri, MANIFEST_NAME)
    problem = ""
    for _ in range(_READS):
        try:
            tree: Any = json.loads(storage.read_bytes(path))
            found = str(tree.get("format")) if isinstance(tree, dict) else ""
            if found.startswith("ctrsink-dataset/") and found != FORMAT:
                raise InputError(f"{path} is of format {found}, this version reads {FORMAT}: prepare the data set again")
            return Manifest.model_validate(tree)
        except FileNotFoundError:
            raise InputError(f"{uri} holds no {MANIFEST_NAME}: prepare the data set there with `ctrsink data prepare`") from None
        except ValidationError as error:
            problem = explain(error, Manifest)
        except RecursionError:
            problem = "nested without end"
        except ValueError as error:
            problem = first_line(error)
    raise InputError(f"{path} is damaged ({problem}): prepare the data set again with `ctrsink data prepare`")


def require_none(uri: str) -> None:
    """Raise InputError where the folder `uri` holds a data set already."""
    if storage.exists(storage.join(uri, MANIFEST_NAME)):
        raise InputError(f"{uri} holds a data set already: choose another folder, or replace it with --overwrite")


def read_file(uri: str, entry: FileEntry) -> bytes:
    """The content of one file of the data set, checked against its size and hash.

    Raises:
        InputError: the file is missing, truncated or altered.
    """
    path = storage.join(uri, entry.path)
    problem = ""
    for _ in range(_READS):
        try:
            content = storage.read_bytes(path)
        except FileNotFoundError:
            raise InputError(f"{path} is missing, but the manifest lists it: prepare the data set again") from None
        if len(content) < entry.bytes:
            problem = f"has {len(content)} bytes, the manifest says {entry.bytes}: it is truncated"
        elif storage.sha256(content) != entry.sha256:
            problem = "does not match the sha256 in the manifest: it was altered or replaced"
        else:
            return content
    raise InputError(f"{path} {problem}; prepare the data set again")
