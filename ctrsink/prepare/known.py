"""What a data set knows for its signals: how items were received, which are neighbours, how large the numbers are."""

from itertools import chain

import pyarrow as pa

from ctrsink.dataset.arrow import to_parquet, unpack
from ctrsink.dataset.manifest import VECTOR, NeighboursEntry, Scale, ShardEntry, StatisticsEntry, read_file
from ctrsink.dataset.shard import Knowing, read_neighbours
from ctrsink.features.columns import columns_of
from ctrsink.features.registry import Need, numbers_with, of_kind
from ctrsink.prepare.assemble import Assembly, put
from ctrsink.prepare.execute import run_tasks
from ctrsink.prepare.items import Items
from ctrsink.prepare.job import Job
from ctrsink.prepare.moments import Moments
from ctrsink.prepare.neighbours import Pairing, cut_items, mean_square
from ctrsink.prepare.partition import Partition, read_lookup
from ctrsink.prepare.repeats import Repeats
from ctrsink.prepare.results import read_named, write_named
from ctrsink.prepare.statistics import Received, Rule, counts_in, totals_as_counts


def received_of(job: Job, partition: Partition, repeats: Repeats | None, ids: str) -> Received:
    """How items were received in the whole log, and in what the data set held before.

    Args:
        ids: file of the lookup of all items.
    """
    before = None
    if job.base is not None:
        entry = job.base.statistics
        before = totals_as_counts(read_file(job.to, entry.file), entry.last_period)
    counts = counts_in(partition.folder, len(partition.blocks))
    if repeats is not None:  # what is dropped was counted with the others
        counts = chain(counts, counts_in(repeats.folder, len(repeats.ranges)))
    return Received.of(counts, read_lookup(ids), before)


def write_groups(job: Job, items: Items, received: Received) -> dict[str, tuple[str, str]]:
    """Write which items are alike in columns that are counted by, and how those that are were received; see Assembly.groups."""
    found: dict[str, tuple[str, str]] = {}
    for column in columns_of(job.spec.columns):
        if column.received and column.name not in found:
            groups = items.groups(column)
            of_items = write_named(job.work, "groups", pa.table({"group": groups}))
            found[column.name] = of_items, write_named(job.work, "received", received.grouped(groups).to_table())
    return found


def write_statistics(job: Job, partition: Partition, received: Received, items: int) -> StatisticsEntry:
    """Put how `items` many items were received into the data set, for its manifest."""
    table, last = received.totals(items)
    rule = Rule.of(job.spec.statistics)
    return StatisticsEntry(
        period_s=rule.period_s,
        strength=rule.strength,
        user_events=job.spec.statistics.user_events,
        outcome="feedback" if partition.source.columns.feedback is not None else "label",
        fields=job.spec.statistics.fields,
        last_period=last,
        file=put(job.to, "statistics", ".parquet", to_parquet(table), job.appended),
    )


def write_neighbours(job: Job, assembly: Assembly, items: int) -> NeighboursEntry | None:
    """Run the third tasks, and put the neighbours of `items` many items into the data set; None: none are asked for."""
    spec, counted = job.spec.neighbours, assembly.counted
    if spec is None or counted is None:
        return None
    files = tuple(assembly.path(number, "opinions") for number in range(len(assembly.ranges)))
    task = Pairing(job.folder("pairs", assembly.folder, spec), files, items, cut_items(files, items), spec.partners)
    run_tasks(task, len(task.ranges), job.execute, "computed neighbours of ranges of items:")
    table = pa.concat_tables([task.result(number) for number in range(len(task.ranges))]).combine_chunks()
    return NeighboursEntry(
        file=put(job.to, "neighbours", ".parquet", to_parquet(table)),
        variance=mean_square(files),
        shrink=spec.shrink,
        until=counted.until,
        user_events=counted.user_events,
    )


def text_line(job: Job, neighbours: NeighboursEntry | None, vectors: str | None) -> tuple[float, float] | None:
    """How similarity by neighbours follows from the cosine of texts; None: these do not stand in."""
    spec = job.spec.neighbours
    if neighbours is None or vectors is None or spec is None or not spec.by_text:
        return None
    table = read_neighbours(read_file(job.to, neighbours.file), neighbours.variance, neighbours.shrink)
    line = table.text_line(unpack(read_named(vectors).column(VECTOR)))
    return line.intercept, line.slope


def scales_of_numbers(
    job: Job,
    assembly: Assembly,
    shards: tuple[ShardEntry, ...],
    statistics: StatisticsEntry,
    neighbours: NeighboursEntry | None,
    line: tuple[float, float] | None,
) -> dict[str, Scale]:
    """Run the last tasks: mean and deviation of each number that the data set can tell."""
    has: tuple[Need, ...] = (*(["fields"] if statistics.fields else []), *(["neighbours"] if neighbours else []))
    task = Moments(
        folder=job.folder("moments", assembly.folder, neighbours, line),
        to=job.to,
        shards=shards,
        knowing=Knowing(statistics.outcome, assembly.counted, statistics.user_events, of_kind(job.spec.columns, numbers=True)),
        neighbours=neighbours,
        text_line=line,
        split_times=assembly.split_times,
        names=numbers_with(has, job.spec.columns),
    )
    run_tasks(task, len(shards), job.execute, "computed signals of shards:")
    return task.scales()
