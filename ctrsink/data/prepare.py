"""From the raw log to a data set on disk or S3: shards of tokenised chronologies, an index of users, the manifest last."""

import logging
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from ctrsink import storage
from ctrsink.config.data import PrepareSpec
from ctrsink.data import chronology, tokenize
from ctrsink.data.chronology import NO_LABEL, Chronologies
from ctrsink.data.events import EventLog, OnBadRow
from ctrsink.data.manifest import FORMAT, MANIFEST_NAME, SHARD_SCHEMA, TOKENS_SCHEMA, FileEntry, Manifest, PartEntry, ShardEntry
from ctrsink.data.render import feedback_texts, item_texts
from ctrsink.data.sources import read_source
from ctrsink.errors import InputError

log = logging.getLogger("ctrsink.data")
pc: Any = pyarrow.compute  # its functions are made when it is imported: no type checker sees them

_Columns = dict[str, pa.Array | pa.ChunkedArray]  # those of a shard, flat: all events in the order of Chronologies


def prepare(spec: PrepareSpec, to: str, on_bad_row: OnBadRow = "fail", overwrite: bool = False) -> Manifest:
    """Prepare the log that `spec` names as a data set in the folder `to`, local or s3://.

    The same log and `spec` give the same bytes. Without a manifest a folder is no data set, so an interrupted
    preparation leaves none behind.

    Raises:
        InputError: the log or the configuration cannot be used, or `to` holds a data set and `overwrite` is not set.
    """
    if storage.exists(storage.join(to, MANIFEST_NAME)) and not overwrite:
        raise InputError(f"{to} holds a data set already: choose another folder, or replace it with --overwrite")
    source = read_source(spec.source, on_bad_row)
    log.info("read %d events of %d items", source.events.num_rows, source.items.num_rows)

    users = chronology.chronologies(source.events.column("user").combine_chunks(), _numpy(source.events, "timestamp", 0))
    events = source.events.take(pa.array(users.order)).combine_chunks()
    timestamp, feedback = _numpy(events, "timestamp", 0), _numpy(events, "feedback", np.nan)
    label = chronology.labels(
        _numpy(events, "label", NO_LABEL), feedback, spec.source.columns.label is not None, spec.positive_from
    )
    if (label == NO_LABEL).all():
        raise InputError(f"no event of {spec.source.path} has a label: map source.columns.label or source.columns.feedback")
    times = chronology.split_times(timestamp[label != NO_LABEL], spec.split)
    split = chronology.split_of(timestamp, times)
    counts = chronology.count_splits(split, label, spec.split)
    shards = chronology.cut_shards(users.offsets, spec.shard_events)

    feedback_rows, feedback_id = feedback_texts(spec.text, feedback)
    texts = item_texts(spec.text.item, source.items)
    tokenizer = tokenize.make_tokenizer(spec.tokenizer, [*texts, *feedback_rows])
    tokens = _item_tokens(tokenizer, texts, source, spec.text.max_item_tokens)
    flat: _Columns = {
        "item": pc.cast(pc.index_in(events.column("item"), source.items.column("item").combine_chunks()), pa.int32()),
        "timestamp": events.column("timestamp"),
        "feedback": events.column("feedback"),
        "feedback_id": pa.array(feedback_id),
        "label": pa.array(label, mask=label == NO_LABEL),
        "request": events.column("request"),
    }

    # Only now, with all the input good, is anything at the place changed.
    for old in (MANIFEST_NAME, "shards", tokenize.FOLDER):
        storage.delete(storage.join(to, old))
    entries = _write_shards(to, flat, users, tokens, shards)
    result = Manifest(
        format=FORMAT,
        parts=(
            PartEntry(
                split_times=times,
                splits=counts,
                users=len(users.users),
                events=events.num_rows,
                first_time=int(timestamp.min()),
                last_time=int(timestamp.max()),
                skipped_rows=source.skipped_rows,
            ),
        ),
        shards=entries,
        index=_put(to, "index.parquet", _parquet(chronology.user_index(users.offsets, split, label, shards))),
        items=_put(to, "items.parquet", _parquet(_items(source.items, texts))),
        tokenizer=tuple(
            _put(to, storage.join(tokenize.FOLDER, name), content)
            for name, content in tokenize.tokenizer_files(tokenizer).items()
        ),
        tokenizer_fingerprint=tokenize.fingerprint(tokenizer),
        text=spec.text,
        positive_from=spec.positive_from,
        prefix_tokens=tuple(tokenize.prefix_tokens(tokenizer, spec.text.prefix)),
        feedback_tokens=tuple(tuple(ids) for ids in tokenize.encode(tokenizer, feedback_rows)),
        item_count=source.items.num_rows,
    )
    storage.write_bytes(storage.join(to, MANIFEST_NAME), (result.model_dump_json(indent=1) + "\n").encode())
    log.info("prepared %d users and %d events in %d shards at %s", result.users, result.events, len(shards), to)
    return result


def _numpy(table: pa.Table, column: str, absent: float) -> np.ndarray:
    return pc.fill_null(table.column(column), absent).combine_chunks().to_numpy(zero_copy_only=False)


def _item_tokens(tokenizer: PreTrainedTokenizerBase, texts: list[str], source: EventLog, limit: int) -> pa.Array:
    """Token ids of every item, list<int32>, cut to `limit`."""
    ids = [tokens[:limit] for tokens in tokenize.encode(tokenizer, texts)]
    for number, tokens in enumerate(ids):
        if not tokens:
            item = source.items.column("item")[number].as_py()
            raise InputError(
                f"the text of item {item!r} is empty: fill in its fields in the item table, or add text to text.item"
            )
    return pa.array(ids, TOKENS_SCHEMA.field("tokens").type)


def _write_shards(
    to: str, flat: _Columns, users: Chronologies, tokens: pa.Array, shards: list[tuple[int, int]]
) -> tuple[ShardEntry, ...]:
    """Write each range of users and, beside it, the tokens of just the items that it mentions."""
    entries: list[ShardEntry] = []
    for number, (first, end) in enumerate(shards):
        table = _shard(flat, users, first, end)
        mentioned = table.column("item").combine_chunks().flatten().unique().sort()
        sidecar = pa.Table.from_arrays([mentioned, tokens.take(mentioned)], schema=TOKENS_SCHEMA)
        entry = ShardEntry(
            part=0,
            users=end - first,
            events=int(users.offsets[end] - users.offsets[first]),
            events_file=_put(to, f"shards/{number:05d}.parquet", _parquet(table)),
            tokens_file=_put(to, f"shards/{number:05d}.tokens.parquet", _parquet(sidecar)),
        )
        log.info("shard %d of %d: %d users, %d events", number + 1, len(shards), entry.users, entry.events)
        entries.append(entry)
    return tuple(entries)


def _shard(flat: _Columns, users: Chronologies, first: int, end: int) -> pa.Table:
    """The chronologies of users [first, end), in SHARD_SCHEMA."""
    start, stop = int(users.offsets[first]), int(users.offsets[end])
    offsets = pa.array((users.offsets[first : end + 1] - start).astype(np.int32))
    columns: list[pa.Array] = [pa.array(users.users[first:end], pa.string())]
    for name in SHARD_SCHEMA.names[1:]:
        values = flat[name].slice(start, stop - start)
        values = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
        columns.append(pa.ListArray.from_arrays(offsets, values))
    return pa.Table.from_arrays(columns, schema=SHARD_SCHEMA)


def _items(items: pa.Table, texts: list[str]) -> pa.Table:
    """The item table as kept: `id`, `text`, and the fields that are not called so."""
    fields = {name: items.column(name) for name in items.column_names if name not in ("item", "id", "text")}
    return pa.table({"id": items.column("item"), **fields, "text": pa.array(texts, pa.string())})


def _parquet(table: pa.Table) -> bytes:
    """Deterministic bytes: one row group, no dictionary whose size would decide on the encoding."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", use_dictionary=False, row_group_size=max(table.num_rows, 1))
    return sink.getvalue().to_pybytes()


def _put(to: str, path: str, content: bytes) -> FileEntry:
    storage.write_bytes(storage.join(to, path), content)
    return FileEntry(path=path, bytes=len(content), sha256=storage.sha256(content))
