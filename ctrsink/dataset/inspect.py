"""What is in a prepared data set: counts, label rates, lengths, tokens and times, gathered shard by shard."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from ctrsink.dataset.arrow import from_parquet, pc
from ctrsink.dataset.cells import iso
from ctrsink.dataset.known import known_events
from ctrsink.dataset.manifest import SPLITS, Manifest, ShardEntry, read_file, read_manifest
from ctrsink.text_table import aligned

DAY = 86_400
HISTORIES = (10, 20, 50, 100)
"""Values of `data.history` for which the length of a `per_target` sequence is told."""
QUANTILES = (0.1, 0.5, 0.9, 0.99)


@dataclass
class Counts:
    """How often each whole number from 0 on was met."""

    of: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int64))

    def add(self, values: np.ndarray) -> None:
        more = np.bincount(values, minlength=len(self.of))
        more[: len(self.of)] += self.of
        self.of = more

    def summary(self) -> dict[str, float]:
        """See distribution."""
        return _distribution(np.arange(len(self.of)), self.of)


@dataclass
class Inspection:
    """What was gathered; an event that stands in a later part as history only is counted once."""

    uri: str
    manifest: Manifest
    users: int
    """Those with chronologies in several parts counted once (unless appended with prepare.past_events 0, which tells nothing)."""
    split_events: np.ndarray
    """int64 [parts, splits]."""
    first_day: int
    """Days since 1970 (UTC) of the oldest event."""
    days: np.ndarray
    """int64 [3, days]: events, impressions and positives."""
    item_events: np.ndarray
    """int64 [items]."""
    item_tokens: np.ndarray
    """int64 [items]: -1 where no shard mentions the item."""
    hours: np.ndarray = field(default_factory=lambda: np.zeros(24, np.int64))
    """Events by hour of the day (UTC)."""
    behaviours: Counts = field(default_factory=Counts)
    """Targets by how many behaviours were known when they were shown."""
    behaviour_tokens: Counts = field(default_factory=Counts)
    sequence_tokens: dict[int, Counts] = field(default_factory=lambda: {history: Counts() for history in HISTORIES})
    """By HISTORIES; without sinks, of which there is one for each behaviour."""


def inspect(uri: str) -> Inspection:
    """Read every shard of the data set in the folder `uri`, one in memory at a time.

    Raises:
        InputError: the manifest or a file is missing or damaged.
    """
    manifest = read_manifest(uri)
    index = from_parquet(read_file(uri, manifest.index))
    shard_of_row, past = index["shard"].to_numpy(), index["past_events"].to_numpy()
    part_of_row = np.array([shard.part for shard in manifest.shards], np.int64)[shard_of_row]
    first_day = min(part.first_time for part in manifest.parts) // DAY
    last_day = max(part.last_time for part in manifest.parts) // DAY
    found = Inspection(
        uri=uri,
        manifest=manifest,
        users=0,
        split_events=np.stack([_sums(part_of_row, index[f"{split}_events"], len(manifest.parts)) for split in SPLITS], axis=1),
        first_day=first_day,
        days=np.zeros((3, last_day - first_day + 1), np.int64),
        item_events=np.zeros(manifest.item_count, np.int64),
        item_tokens=np.full(manifest.item_count, -1, np.int64),
    )
    bounds = np.searchsorted(shard_of_row, np.arange(len(manifest.shards) + 1))
    for number, shard in enumerate(manifest.shards):
        _add_shard(found, shard, past[bounds[number] : bounds[number + 1]])
    return found


def _sums(group: np.ndarray, values: pa.ChunkedArray, groups: int) -> np.ndarray:
    return np.bincount(group, values.to_numpy(), groups).astype(np.int64)


def _add_shard(found: Inspection, shard: ShardEntry, past: np.ndarray) -> None:
    content = read_file(found.uri, shard.events_file)
    first_time = found.manifest.parts[shard.part].first_time
    table = from_parquet(content, columns=["item", "timestamp", "feedback_id", "label", "request"])
    tokens = from_parquet(read_file(found.uri, shard.tokens_file), columns=["item", "tokens"])
    lengths = pc.list_value_length(table["item"]).to_numpy()
    item, timestamp, feedback, label = (_flat(table, name) for name in ("item", "timestamp", "feedback_id", "label"))

    mentioned, text_tokens = tokens["item"].to_numpy(), pc.list_value_length(tokens["tokens"]).to_numpy().astype(np.int64)
    found.item_tokens[mentioned] = text_tokens
    text = text_tokens[np.searchsorted(mentioned, item)]
    behaviour = text + np.array([len(ids) for ids in found.manifest.feedback_tokens], np.int64)[feedback]

    firsts = np.cumsum(lengths) - lengths
    starts = np.repeat(firsts, lengths)
    own = timestamp >= first_time  # what lies before was counted in an earlier part
    found.users += int(own[firsts].sum())  # who was there in an earlier part has a past
    shown = (label >= 0) & (np.arange(len(item)) - starts >= np.repeat(past, lengths))
    targets = np.flatnonzero(shown)
    known = known_events(table["request"].combine_chunks().flatten(), lengths)[targets]
    found.behaviours.add(known)
    found.behaviour_tokens.add(behaviour[own])
    total, before = np.append(0, np.cumsum(behaviour)), starts[targets] + known
    for history, counts in found.sequence_tokens.items():
        window = total[before] - total[np.maximum(before - history, starts[targets])]
        counts.add(len(found.manifest.prefix_tokens) + window + text[targets])

    day, days = timestamp // DAY - found.first_day, found.days.shape[1]
    for row, chosen in enumerate((own, shown, shown & (label > 0))):
        found.days[row] += np.bincount(day[chosen], minlength=days)
    found.hours += np.bincount(timestamp[own] % DAY // 3600, minlength=24)
    found.item_events += np.bincount(item[own], minlength=len(found.item_events))


def _flat(table: pa.Table, name: str) -> np.ndarray:
    return pc.fill_null(table[name].combine_chunks().flatten(), -1).to_numpy().astype(np.int64)


def summarise(found: Inspection) -> dict[str, Any]:
    """The figures by name, for JSON: times as UTC in ISO 8601, shares from 0 to 1, sizes in bytes."""
    manifest = found.manifest
    popular = np.sort(found.item_events)[::-1]
    return {
        "uri": found.uri,
        "events": manifest.events,
        "users": found.users,
        "chronologies": manifest.users,
        "items": manifest.item_count,
        "items_never_seen": int((found.item_events == 0).sum()),
        "first_time": iso(min(part.first_time for part in manifest.parts)),
        "last_time": iso(max(part.last_time for part in manifest.parts)),
        "busiest_hour": int(found.hours.argmax()),
        "quietest_hour": int(found.hours.argmin()),
        "skipped_rows": manifest.skipped_rows,
        "duplicates": {
            "kept": sum(part.duplicates for part in manifest.parts if not part.duplicates_dropped),
            "dropped": sum(part.duplicates for part in manifest.parts if part.duplicates_dropped),
        },
        "shards": len(manifest.shards),
        "bytes": sum(file.bytes for file in manifest.common_files)
        + sum(shard.events_file.bytes + shard.tokens_file.bytes for shard in manifest.shards),
        "popularity": {f"top_{percent}_percent": _top(popular, percent) for percent in (1, 10)},
        "splits": {name: _split(found, name) for name in (*SPLITS, "all")},
        "parts": [_part(found, number) for number in range(len(manifest.parts))],
        "distributions": {
            "behaviours_before_target": found.behaviours.summary(),
            "item_tokens": distribution(found.item_tokens[found.item_tokens >= 0]),
            "behaviour_tokens": found.behaviour_tokens.summary(),
            **{f"sequence_tokens_history_{h}": counts.summary() for h, counts in found.sequence_tokens.items()},
            "events_of_day": distribution(found.days[0]),
            "events_of_item": distribution(found.item_events),
            "events_of_shard": distribution(shard.events for shard in manifest.shards),
            "bytes_of_shard": distribution(shard.events_file.bytes for shard in manifest.shards),
            "bytes_of_shard_tokens": distribution(shard.tokens_file.bytes for shard in manifest.shards),
        },
    }


def _part(found: Inspection, number: int) -> dict[str, Any]:
    part = found.manifest.parts[number]
    train_from = part.split_times.train_from
    begin = part.first_time if train_from is None else train_from
    ends = (begin, part.split_times.train_end, part.split_times.valid_end, part.last_time)
    splits = {}
    for at, name in enumerate(SPLITS):
        counts = part.splits[name]
        splits[name] = {"from": iso(ends[at]), "until": iso(ends[at + 1])} | _rate(
            int(found.split_events[number, at]), counts.impressions, counts.positives
        )
    return {
        "chronologies": part.users,
        "events": part.events,
        "history_only": part.events - int(found.split_events[number].sum()),
        "skipped_rows": part.skipped_rows,
        "duplicates": part.duplicates,
        "splits": splits,
    }


def _split(found: Inspection, name: str) -> dict[str, Any]:
    chosen = [at for at, split in enumerate(SPLITS) if name in (split, "all")]
    counts = [found.manifest.splits[SPLITS[at]] for at in chosen]
    events = int(found.split_events[:, chosen].sum())
    return _rate(events, sum(c.impressions for c in counts), sum(c.positives for c in counts))


def _rate(events: int, impressions: int, positives: int) -> dict[str, Any]:
    rate = positives / impressions if impressions else float("nan")
    return {"events": events, "impressions": impressions, "positives": positives, "label_rate": rate}


def _top(popular: np.ndarray, percent: int) -> dict[str, Any]:
    """The most seen `percent` of the items of the table, one at least, and their share of the events."""
    items = max(1, round(len(popular) * percent / 100))
    return {"items": items, "share_of_events": float(popular[:items].sum() / popular.sum())}


def distribution(values: Iterable[int]) -> dict[str, float]:
    """Mean, quantiles (the least value that such a share does not exceed) and extremes; nothing of no values."""
    return _distribution(*np.unique(np.fromiter(values, np.int64), return_counts=True))


def _distribution(values: np.ndarray, counts: np.ndarray) -> dict[str, float]:
    """The same of ascending values that were met `counts` times."""
    total, values, counts = int(counts.sum()), values[counts > 0], counts[counts > 0]
    if not total:
        return {}
    reached = np.cumsum(counts)
    quantiles = {f"p{round(100 * share)}": int(values[np.searchsorted(reached, share * total)]) for share in QUANTILES}
    return {"mean": round(float(values @ counts / total), 2), "min": int(values[0]), **quantiles, "max": int(values[-1])}


def as_table(summary: dict[str, Any]) -> str:
    """What `summarise` gives, for people."""
    top = [f"{t['share_of_events']:.1%} of the events on the top {_number(t['items'])}" for t in summary["popularity"].values()]
    unseen = summary["items_never_seen"]
    head = [
        ("data set", summary["uri"]),
        ("events", f"{_number(summary['events'])} from {_date(summary['first_time'])} to {_date(summary['last_time'])} UTC"),
        ("users", f"{_number(summary['users'])} in {_number(summary['chronologies'])} chronologies"),
        ("items", f"{_number(summary['items'])}, {_number(unseen)} of them never seen; {', '.join(top)}"),
        ("day", f"busiest from {summary['busiest_hour']}:00, quietest from {summary['quietest_hour']}:00 UTC"),
        ("files", f"{_number(summary['bytes'])} bytes, {_number(summary['shards'])} shards"),
        ("skipped rows", _number(summary["skipped_rows"])),
        ("logged again", ", ".join(f"{_number(events)} events {what}" for what, events in summary["duplicates"].items())),
        ("history only", f"{_number(sum(part['history_only'] for part in summary['parts']))} events before train_from"),
    ]
    splits = [
        (str(number), name, _date(split["from"]), _date(split["until"]), *_rates(split))
        for number, part in enumerate(summary["parts"])
        for name, split in part["splits"].items()
    ]
    totals = [("all", name, "", "", *_rates(split)) for name, split in summary["splits"].items()]
    shown = [(name, row) for name, row in summary["distributions"].items() if row]
    columns = list(shown[0][1])
    lengths = [(name.replace("_", " "), *(_number(row[column]) for column in columns)) for name, row in shown]
    tables = [
        aligned(head, 2),
        aligned([("part", "split", "from", "until", "events", "impressions", "positives", "rate"), *splits, *totals], 4),
        aligned([("", *columns), *lengths], 1),
    ]
    return "\n\n".join(tables)


def _rates(split: dict[str, Any]) -> tuple[str, ...]:
    rate = split["label_rate"]
    return (*(_number(split[name]) for name in ("events", "impressions", "positives")), "-" if np.isnan(rate) else f"{rate:.4f}")


def _number(value: float) -> str:
    return f"{value:,}"


def _date(iso: str) -> str:
    return iso[:16].replace("T", " ")
