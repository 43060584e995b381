"""Is a prepared data set whole? Every file against its hash, every shard against the index, the index against the manifest."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from ctrsink import storage
from ctrsink.dataset.arrow import from_parquet, pc
from ctrsink.dataset.manifest import (
    INDEX_SCHEMA,
    MANIFEST_NAME,
    SPLITS,
    WORK,
    FileEntry,
    Manifest,
    ShardEntry,
    read_file,
    read_manifest,
)
from ctrsink.dataset.splits import PAST, prefixes, split_of
from ctrsink.errors import InputError

AT_ONCE = 4
"""Shards that are read at the same time, and so those in memory."""
NAMED = 5
"""Bad files that the summary names; each has a line of its own before."""


@dataclass
class _Found:
    """What is wrong, by the path of the file, and what a shard added to the counts of its part."""

    problems: dict[str, str] = field(default_factory=dict)
    impressions: np.ndarray = field(default_factory=lambda: np.zeros((len(SPLITS), 2), np.int64))
    """[splits, label]."""
    times: tuple[int, int] | None = None
    """Of its oldest and newest event, past events not counted."""

    def say(self, path: str, problem: str) -> None:
        """Keep the first problem of a file: what follows is often its consequence."""
        self.problems.setdefault(path, problem)


def verify(uri: str, tell: Callable[[str], None]) -> dict[str, Any]:
    """Read every file of the data set in the folder `uri` and check it; `tell` gets a line for each bad one as it is found.

    Size and sha256 of all; that the shards hold what the index and the manifest count, in order of time, with items of the item
    table and the tokens of each; remarks on files that the manifest does not know. Returns what was checked.

    Raises:
        InputError: a file is bad, or there is no manifest to go by.
    """
    manifest = read_manifest(uri)
    entries = list(manifest.common_files)
    entries += [file for shard in manifest.shards for file in (shard.events_file, shard.tokens_file)]
    bad: list[str] = []
    for path, problem in _problems(uri, manifest):
        bad.append(path)
        tell(f"bad: {storage.join(uri, path)}: {problem}")
    others = sorted(set(_files_below(uri)) - {MANIFEST_NAME, *(entry.path for entry in entries)})
    if any(path.startswith(f"{WORK}/") for path in others):
        tell(f"remark: {storage.join(uri, WORK)} is what a preparation under way, or an interrupted one, keeps to go on")
    for path in others:
        if not path.startswith(f"{WORK}/"):
            tell(f"remark: {storage.join(uri, path)} is no part of the data set")
    files = 1 + len(entries)
    if bad:
        more = f" and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
        raise InputError(f"{len(bad)} of {files} files are bad: {', '.join(bad[:NAMED])}{more}; prepare {uri} again")
    return {
        "data": uri,
        "files": files,
        "bytes": sum(entry.bytes for entry in entries),
        "shards": len(manifest.shards),
        "chronologies": manifest.users,
        "events": manifest.events,
    }


def _problems(uri: str, manifest: Manifest) -> Iterator[tuple[str, str]]:
    """(path, what is wrong with it), each path once."""
    if any(shard.part not in range(len(manifest.parts)) for shard in manifest.shards):
        yield MANIFEST_NAME, f"has shards of a part that is none of its {len(manifest.parts)}"
        return
    found = _Found()
    for entry in manifest.common_files[2:]:  # of index and items more is known
        _read(uri, entry, found)
    _check_items(uri, manifest, found)
    index = _check_index(uri, manifest, found)
    yield from found.problems.items()

    def check(number: int) -> _Found:
        return _check_shard(uri, manifest, number, index)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        try:
            shards: list[_Found] = []
            for shard in pool.map(check, range(len(manifest.shards))):
                yield from shard.problems.items()
                shards.append(shard)
        finally:
            pool.shutdown(cancel_futures=True)  # the user's Ctrl-C need not wait for all that was still to be read
    # Of a part with a bad shard the sums say nothing.
    if not found.problems and not any(shard.problems for shard in shards):
        yield from _check_parts(manifest, shards)


def _read(uri: str, entry: FileEntry, found: _Found) -> bytes | None:
    """A file's content if it is what the manifest says."""
    try:
        return read_file(uri, entry)
    except storage.StorageUnavailable:
        raise  # says nothing of the file
    except InputError as error:
        found.say(entry.path, str(error).removeprefix(storage.join(uri, entry.path)).strip(" :"))
        return None


def _read_table(uri: str, entry: FileEntry, schema: pa.Schema | None, found: _Found) -> pa.Table | None:
    """A file as the table that it is to be."""
    content = _read(uri, entry, found)
    if content is None:
        return None
    try:
        table = from_parquet(content)
    except (pa.ArrowInvalid, OSError) as error:
        found.say(entry.path, f"is no whole parquet file ({' '.join(str(error).split())})")
        return None
    if schema is not None and not table.schema.equals(schema):
        found.say(entry.path, f"has the columns {_columns(table.schema)} instead of {_columns(schema)}")
        return None
    return table


def _columns(schema: pa.Schema) -> str:
    return ", ".join(f"{column.name}: {column.type}" for column in schema)


def _check_items(uri: str, manifest: Manifest, found: _Found) -> None:
    table, path = _read_table(uri, manifest.items, None, found), manifest.items.path
    if table is None:
        return
    if table.num_rows != manifest.item_count:
        found.say(path, f"has {table.num_rows} items, the manifest says {manifest.item_count}")
    for name in {"id", "text"} - set(table.column_names):
        found.say(path, f"has no column {name}")


def _check_index(uri: str, manifest: Manifest, found: _Found) -> dict[str, np.ndarray] | None:
    """The columns of the index, or None where it cannot be trusted."""
    table, path = _read_table(uri, manifest.index, INDEX_SCHEMA, found), manifest.index.path
    if table is None:
        return None
    if any(column.null_count for column in table.columns):
        found.say(path, "has an empty cell")
        return None
    users = np.array([shard.users for shard in manifest.shards])
    if not np.array_equal(table["shard"].to_numpy(), np.repeat(np.arange(len(users)), users)):
        found.say(path, "does not list the users of each shard as the manifest counts them")
    elif not np.array_equal(table["row"].to_numpy(), np.arange(users.sum()) - np.repeat(np.cumsum(users) - users, users)):
        found.say(path, "does not list the rows of each shard in their order")
    return None if path in found.problems else {name: table[name].to_numpy() for name in table.column_names}


def _check_shard(uri: str, manifest: Manifest, number: int, index: dict[str, np.ndarray] | None) -> _Found:
    found, shard = _Found(), manifest.shards[number]
    events = _read_table(uri, shard.events_file, manifest.shard_schema, found)
    tokens = _read_table(uri, shard.tokens_file, manifest.tokens_schema, found)
    mentioned = None
    if events is not None and _check_lists(events, shard, manifest, found):
        _check_counts(events, number, manifest, index, found)
        mentioned = pc.unique(_flat(events, "item")).to_numpy()
    if tokens is not None:
        _check_tokens(tokens, mentioned, shard, found)
    return found


def _check_lists(events: pa.Table, shard: ShardEntry, manifest: Manifest, found: _Found) -> bool:
    """Whether the shard has the users that belong there, whose lists belong together and hold nothing that cannot be."""
    path = shard.events_file.path
    if events.num_rows != shard.users:
        found.say(path, f"has {events.num_rows} users, the manifest says {shard.users}")
        return False
    users = events["user"].combine_chunks()
    if users.null_count or len(users.unique()) < len(users):
        found.say(path, "has a user twice, or without an id")
        return False
    known = prefixes(users)
    strange = np.flatnonzero((known < shard.prefixes[0]) | (known >= shard.prefixes[1]))
    if len(strange):
        found.say(path, f"has user {users[int(strange[0])].as_py()!r}, who belongs to another shard")
    lengths = [pc.fill_null(pc.list_value_length(events[name]), -1).to_numpy() for name in manifest.shard_schema.names[1:]]
    if any(not np.array_equal(column, lengths[0]) for column in lengths) or (lengths[0] < 0).any():
        found.say(path, "has a user whose lists are not equally long")
        return False
    limits = {"item": manifest.item_count, "feedback_id": len(manifest.feedback_tokens), "label": 2, "timestamp": None}
    for name, limit in limits.items():
        values = _flat(events, name)
        if name != "label" and values.null_count:
            found.say(path, f"has an event without {name}")
        least, most = pc.min_max(values).as_py().values()
        if limit is not None and most is not None and (least < 0 or most >= limit):
            found.say(path, f"has {name} {least if least < 0 else most}, it must be from 0 to {limit - 1}")
    return path not in found.problems


def _check_counts(events: pa.Table, number: int, manifest: Manifest, index: dict[str, np.ndarray] | None, found: _Found) -> None:
    """Order of time, and events and impressions of every user in each split as the index has them."""
    shard = manifest.shards[number]
    path, part = shard.events_file.path, manifest.parts[shard.part]
    lengths = pc.list_value_length(events["item"]).to_numpy()
    user, timestamp = np.repeat(np.arange(len(lengths)), lengths), _flat(events, "timestamp").to_numpy()
    backwards = np.flatnonzero((np.diff(timestamp) < 0) & (np.diff(user) == 0))
    if len(backwards):
        name = events["user"][int(user[backwards[0]])].as_py()
        found.say(path, f"has events of user {name!r} that are not in order of time")
        return
    if index is None:
        return
    rows = slice(*np.searchsorted(index["shard"], [number, number + 1]))
    own = timestamp >= part.first_time
    if own.sum() != shard.events:
        found.say(path, f"has {own.sum()} events that are not of earlier parts, the manifest says {shard.events}")
        return
    label = _flat(events, "label").fill_null(-1).to_numpy()
    split = np.where(own, split_of(timestamp, part.split_times), PAST)
    for at, name in ((PAST, "past"), *enumerate(SPLITS)):
        kinds = [("events", split == at), ("impressions", (split == at) & (label >= 0))]
        for what, chosen in kinds[: 1 if at == PAST else 2]:
            wrong = np.flatnonzero(np.bincount(user[chosen], minlength=len(lengths)) != index[f"{name}_{what}"][rows])
            if len(wrong):
                who = events["user"][int(wrong[0])].as_py()
                found.say(path, f"has other {what} of user {who!r} in {name} than the index counts")
                return
    cell = (split.astype(np.int64) * 2 + label)[(split != PAST) & (label >= 0)]
    found.impressions = np.bincount(cell, minlength=2 * len(SPLITS)).reshape(len(SPLITS), 2)
    if own.any():
        found.times = int(timestamp[own].min()), int(timestamp[own].max())


def _check_tokens(tokens: pa.Table, mentioned: np.ndarray | None, shard: ShardEntry, found: _Found) -> None:
    path, items = shard.tokens_file.path, tokens["item"]
    if items.null_count or (np.diff(items.to_numpy()) <= 0).any():
        found.say(path, "does not list each item once, in ascending order")
        return
    lengths = pc.fill_null(pc.list_value_length(tokens["tokens"]), 0).to_numpy()
    if (lengths == 0).any():
        found.say(path, f"has no token for item {items[int((lengths == 0).argmax())].as_py()}")
    missing = np.setdiff1d(mentioned, items.to_numpy()) if mentioned is not None else []
    if len(missing):
        found.say(path, f"lacks {len(missing)} items that its shard mentions, the first of them item {missing[0]}")


def _check_parts(manifest: Manifest, shards: list[_Found]) -> Iterator[tuple[str, str]]:
    """The sums of the shards against what the manifest says of each part."""
    for number, part in enumerate(manifest.parts):
        entries = [entry for entry in manifest.shards if entry.part == number]
        found = [shard for shard, entry in zip(shards, manifest.shards, strict=True) if entry.part == number]
        times = [shard.times for shard in found if shard.times]
        labels = sum((shard.impressions for shard in found), np.zeros((len(SPLITS), 2), np.int64))
        pairs = [
            ("users", part.users, sum(entry.users for entry in entries)),
            ("events", part.events, sum(entry.events for entry in entries)),
            ("duplicates", part.duplicates, sum(entry.duplicates for entry in entries)),
            ("as first time", part.first_time, min((first for first, _ in times), default=None)),
            ("as last time", part.last_time, max((last for _, last in times), default=None)),
        ]
        for at, name in enumerate(SPLITS):
            pairs.append((f"impressions in {name}", part.splits[name].impressions, int(labels[at].sum())))
            pairs.append((f"positives in {name}", part.splits[name].positives, int(labels[at, 1])))
        wrong = [f"{said} {what} (its shards: {counted})" for what, said, counted in pairs if said != counted]
        if wrong:
            yield MANIFEST_NAME, f"says of part {number}: {', '.join(wrong)}"
            return


def _flat(table: pa.Table, name: str) -> pa.Array:
    return table[name].combine_chunks().flatten()


def _files_below(uri: str, below: str = "") -> Iterator[str]:
    folder = storage.join(uri, below) if below else uri
    for name in storage.list_files(folder):
        yield f"{below}{name}"
    for name in storage.list_dirs(folder):
        yield from _files_below(uri, f"{below}{name}/")
