"""What a report says of the data set of a run."""

from functools import partial
from typing import Any

from ctrsink.dataset.inspect import inspect, summarise
from ctrsink.dataset.manifest import read_manifest
from ctrsink.report.data_figures import DRAWINGS
from ctrsink.report.page import SIZE, Figure, Note, Part, Section, Table

MOST_EVENTS = 20_000_000
"""Of a larger data set the manifest alone is read: its shards would take more than a minute or two."""
_CAPTIONS = {
    "history_lengths": "How much history targets have.",
    "over_time": "Events and label rate over time, with the borders of the splits.",
    "popularity": "Popularity of items: a straight line is a power law.",
    "item_tokens": "Tokens of an item's text.",
}


def data_section(uri: str, trained_on: tuple[str, ...]) -> Section:
    """Counts of the data set in `uri` and its figures.

    Args:
        trained_on: identities of the data sets that the runs of the report were trained on.

    Raises:
        InputError: it is missing or damaged.
    """
    manifest = read_manifest(uri)
    parts: list[Part] = []
    if any(identity not in manifest.identities for identity in trained_on):
        parts.append(Note(f"The data set in {uri} is not the one that was trained on: it was prepared anew since.", warning=True))
    splits = [
        (name, f"{own.impressions:,}", f"{own.positives:,}", f"{own.positives / own.impressions:.4f}" if own.impressions else "-")
        for name, own in manifest.splits.items()
    ]
    parts.append(Table(("split", "impressions", "positive", "rate"), splits))
    counts = {
        "chronologies": manifest.users,
        "events": manifest.events,
        "items": manifest.item_count,
        "shards": len(manifest.shards),
    }
    if manifest.events > MOST_EVENTS:
        parts.append(Table(("", ""), [(name, f"{count:,}") for name, count in counts.items()]))
        more = f"draw them with `ctrsink data inspect {uri} --figures DIR`"
        parts.append(
            Note(f"Its figures are left out, because more than {MOST_EVENTS:,} events would be read: {more}.", missing=True)
        )
        return Section("Data", parts, uri)
    found = inspect(uri)
    summary = summarise(found)
    told = [(name, f"{count:,}") for name, count in counts.items()]
    told += [("users", f"{summary['users']:,}"), ("items never seen", f"{summary['items_never_seen']:,}")]
    told += [(name, summary[key][:10]) for name, key in (("first day", "first_time"), ("last day", "last_time"))]
    told += [
        (f"events on the top {top['items']:,} items", f"{top['share_of_events']:.1%}") for top in summary["popularity"].values()
    ]
    parts.append(Table(("", ""), told))
    parts += [Figure(_CAPTIONS[name], partial(draw, found=found), (SIZE[0], _height(name))) for name, draw in DRAWINGS.items()]
    names = {
        "behaviours_before_target": "behaviours before a target",
        "item_tokens": "tokens of an item",
        "events_of_item": "events of an item",
    }
    rows: list[dict[str, Any]] = [summary["distributions"][key] for key in names]
    columns = list(rows[0])
    parts.append(
        Table(
            ("", *columns),
            [(name, *[f"{row[c]:,}" for c in columns]) for name, row in zip(names.values(), rows, strict=True) if row],
        )
    )
    return Section("Data", parts, uri)


def _height(name: str) -> float:
    return 4.2 if name == "over_time" else SIZE[1]
