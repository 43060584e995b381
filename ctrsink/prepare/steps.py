"""From a log to the files of a data set: what the tasks of partition.py, assemble.py and others do is put in order here."""

import logging
from collections.abc import Iterator
from itertools import chain

import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from ctrsink import storage
from ctrsink.dataset import splits
from ctrsink.dataset.arrow import from_parquet, to_parquet
from ctrsink.dataset.manifest import FORMAT, MANIFEST_NAME, WORK, FileEntry, Manifest, PartEntry, ShardEntry, read_file
from ctrsink.errors import InputError, RunError
from ctrsink.features.columns import columns_of
from ctrsink.features.counted import Counted
from ctrsink.prepare import encoder, tokenize
from ctrsink.prepare.assemble import Assembly, put
from ctrsink.prepare.check_rows import OnBadRow
from ctrsink.prepare.execute import run_tasks
from ctrsink.prepare.items import Items, columns_used
from ctrsink.prepare.job import Job
from ctrsink.prepare.judge import check_totals, warn_of_duplicates, warn_of_forms
from ctrsink.prepare.known import received_of, scales_of_numbers, text_line, write_groups, write_neighbours, write_statistics
from ctrsink.prepare.partition import Partition
from ctrsink.prepare.past import Past
from ctrsink.prepare.pile import Pile, merged, slices
from ctrsink.prepare.places import Places
from ctrsink.prepare.render import feedback_table
from ctrsink.prepare.repeats import Repeats
from ctrsink.prepare.results import write_named
from ctrsink.prepare.sources import open_source
from ctrsink.prepare.survey import Survey, Totals, count_splits, split_times
from ctrsink.prepare.vectors import Encoding

log = logging.getLogger("ctrsink.data")
_ROW_BYTES = 32  # of a log, about: only to guess how finely blocks are sliced


def run_steps(job: Job, on_bad_row: OnBadRow) -> Manifest:
    """Write all files of the data set but the manifest, which is returned.

    Raises:
        InputError: the log or the configuration cannot be used.
        RunError: events are lost.
    """
    spec, base = job.spec, job.base
    told = columns_of(spec.columns)
    logged = tuple(column for column in told if column.of == "log")
    source = open_source(spec.source, columns_used(spec), [column.name for column in logged])
    listed = source.items()
    blocks = tuple(source.blocks(spec.block_bytes))
    # A tokenizer or an encoder that cannot be had is found before hours of work.
    tokenizer = _given_tokenizer(job)
    encoding = Encoding.of(job)
    items = Items.of(listed, spec.text) if listed is not None else None
    if base is not None:
        old = Items(from_parquet(read_file(job.to, base.items)))
        items = old if listed is None else old.extended(listed, spec.text)
    (items or Items.of(pa.table({"item": pa.array([], pa.string())}), spec.text)).check(spec)
    items = items and items.mapped(job.work)
    welcome = items.write_ids(job.work) if items is not None and listed is not None else None
    known, listed = listed is not None, None  # from here on the table is a mapped file
    versions = {block.file: storage.info(block.file) for block in blocks}
    cut = slices(sum(info.bytes for info in versions.values()) / _ROW_BYTES / spec.shard_events)
    label_rule = (spec.text, spec.positive_from, spec.statistics, logged)
    partition = Partition(
        spec=spec,
        source=source,
        blocks=blocks,
        folder=job.folder("blocks", spec.source, *label_rule, blocks, versions, welcome, cut),
        slices=cut,
        items=welcome,
    )
    totals = _read(job, partition, on_bad_row)
    check_totals(job, totals)
    warn_of_forms(job, totals, items)
    pile = merged(job, partition.pile(), len(splits.cut_shards(totals.prefix_events, spec.shard_events)), job.execute)
    repeats = _repeats(job, partition, pile, totals)

    def surveys() -> Iterator[Survey]:
        yield from (partition.survey(number) for number in range(len(blocks)))
        yield from repeats.surveys() if repeats else ()

    times = split_times(totals, surveys, spec.split)
    counts = count_splits(surveys(), times)
    splits.check_splits(counts, spec.split, totals.first_time, totals.last_time)

    if not known:
        found = pa.table({"item": pa.array(sorted(totals.items), pa.string())})
        items = (Items.of(found, spec.text) if items is None else items.extended(found, spec.text)).mapped(job.work)
    assert items is not None
    texts = feedback_table(spec.text, base.feedback_texts if base else (), totals.feedback)
    tokenizer = tokenizer or tokenize.make_tokenizer(spec.tokenizer, chain(items.vocabulary_texts(), texts))
    ids = items.write_ids(job.work)
    tokens = items.write_tokens(job.work, tokenizer, spec.text)
    fields = items.write_fields(job.work, spec.statistics.fields)
    received = received_of(job, partition, repeats, ids)
    received_path = write_named(job.work, "received", received.to_table())
    values = items.write_values(job.work, tuple(column for column in told if not column.by_event))
    groups = write_groups(job, items, received)
    vectors = encoding and encoding.write_vectors(job, items)
    ranges = tuple(splits.cut_shards(totals.prefix_events, spec.shard_events))
    past = Past(job.to, base, spec.past_events) if base else None
    table = spec.neighbours if base is None else None
    counted = Counted(times.train_end, table.user_events) if table else None
    facts = (partition.folder, ranges, times, texts, ids, tokens, vectors, past, spec.duplicates, fields, received_path, counted)
    facts = (*facts, spec.request_is_second, spec.statistics, spec.columns, values, groups)
    assembly = Assembly(
        partition=partition,
        to=job.to,
        folder=job.folder("shards", *facts),
        pile=pile,
        ranges=ranges,
        split_times=times,
        feedback_texts=texts,
        items=ids,
        tokens=tokens,
        vectors=vectors,
        fields=fields,
        received=received_path,
        values=values,
        groups=groups,
        counted=counted,
        part=len(base.parts) if base else 0,
        first_shard=len(base.shards) if base else 0,
        past=past,
    )
    if base is None and not assembly.done():
        _clear_way(job)
    shards, index = _write(job, assembly, totals)
    written = sum(entry.events for entry in shards)
    if written != totals.events:
        raise RunError(f"{written} of {totals.events} events reached the shards of {job.to}: remove {job.work} and repeat")
    duplicates = sum(entry.duplicates for entry in shards)
    warn_of_duplicates(job, duplicates, totals.events)
    part = PartEntry(
        split_times=times,
        splits=counts,
        users=index.num_rows,
        events=totals.events,
        first_time=totals.first_time,
        last_time=totals.last_time,
        skipped_rows=totals.rows - totals.events,
        duplicates=duplicates,
        duplicates_dropped=spec.duplicates == "drop",
        past_events=spec.past_events if base else 0,
    )
    item_count = items.table.num_rows
    statistics = write_statistics(job, partition, received, item_count)
    neighbours = base.neighbours if base else write_neighbours(job, assembly, item_count)
    line = base.text_line if base else text_line(job, neighbours, vectors)
    if base is not None:
        index = pa.concat_tables([from_parquet(read_file(job.to, base.index)), index])
    return Manifest(
        format=FORMAT,
        parts=(*(base.parts if base else ()), part),
        shards=(*(base.shards if base else ()), *shards),
        numbers=base.numbers if base else scales_of_numbers(job, assembly, shards, statistics, neighbours, line),
        statistics=statistics,
        neighbours=neighbours,
        columns=spec.columns,
        text_line=line,
        tokenizer=_tokenizer_files(job, tokenizer),
        index=put(job.to, "index", ".parquet", to_parquet(index), job.appended),
        items=put(job.to, "items", ".parquet", to_parquet(items.table), job.appended),
        tokenizer_fingerprint=tokenize.fingerprint(tokenizer),
        encoder=encoding.entry(job.to, vectors) if encoding and vectors else None,
        text=spec.text,
        positive_from=spec.positive_from,
        labelled=source.columns.label is not None,
        request_is_second=spec.request_is_second,
        prefix_tokens=tuple(tokenize.prefix_tokens(tokenizer, spec.text.prefix)),
        feedback_texts=texts,
        feedback_tokens=tuple(tuple(ids) for ids in tokenize.encode_own(tokenizer, list(texts))),
        item_count=item_count,
    )


def _given_tokenizer(job: Job) -> PreTrainedTokenizerBase | None:
    """The one that there is, or None where it is to be trained on the texts of this log."""
    if job.base is not None:
        return tokenize.load_tokenizer(job.to, job.base)
    return tokenize.make_tokenizer(job.spec.tokenizer, []) if job.spec.tokenizer.path is not None else None


def _tokenizer_files(job: Job, tokenizer: PreTrainedTokenizerBase) -> tuple[FileEntry, ...]:
    if job.base is not None:
        return job.base.tokenizer
    contents = tokenize.tokenizer_files(tokenizer)
    return tuple(put(job.to, storage.join(tokenize.FOLDER, name), "", content) for name, content in contents.items())


def _read(job: Job, partition: Partition, on_bad_row: OnBadRow) -> Totals:
    """Run the first tasks; a bad row ends it as soon as it is known which is the first."""
    blocks, totals, places = partition.blocks, Totals(), Places()

    def take(number: int) -> tuple[float, int]:
        block, survey = blocks[number], partition.survey(number)
        where = places.next(block.file, survey.file_rows, survey.header_lines, survey.problem)
        if where and survey.problem and survey.problem.of_file:
            raise InputError(where)
        if where and on_bad_row == "fail":
            raise InputError(f"{where}; correct it, or leave bad rows out with --on-bad-row skip")
        if where:
            log.warning("%s: skipped %d bad rows; the first: %s", block.file, survey.rows - survey.events, where)
        totals.add(survey)
        return block.end - block.start, survey.rows

    work = sum(block.end - block.start for block in blocks)
    run_tasks(partition, len(blocks), job.execute, "read", take, work, before="blocks have been read")
    return totals


def _repeats(job: Job, partition: Partition, pile: Pile, totals: Totals) -> Repeats | None:
    """Where events that were logged again are to be dropped: find them and take them off `totals`."""
    if job.spec.duplicates == "keep":
        return None
    ranges = tuple(splits.cut_shards(totals.prefix_events, job.spec.shard_events))
    repeats = Repeats(partition, job.folder("repeats", partition.folder, ranges), pile, ranges)
    repeats.run(job.execute)
    for survey in repeats.surveys():
        totals.add(survey)
    return repeats


def _clear_way(job: Job) -> None:
    """Remove what was at the place: only now, with all the input good, is anything there changed.

    Entries that an attempt with another configuration left speak of shards that are gone then.
    """
    stale = [storage.join(WORK, name) for name in storage.list_dirs(job.work) if name.startswith("shards-")]
    for name in (MANIFEST_NAME, *stale, "shards", tokenize.FOLDER, encoder.FOLDER):
        storage.delete(storage.join(job.to, name))


def _write(job: Job, assembly: Assembly, totals: Totals) -> tuple[tuple[ShardEntry, ...], pa.Table]:
    """Run the second tasks; returns the shards' entries and the part's index."""
    results: list[tuple[ShardEntry, pa.Table]] = []

    def take(number: int) -> tuple[float, int]:
        results.append(assembly.result(number))
        return results[-1][0].events, results[-1][0].events

    shards = len(assembly.ranges)
    run_tasks(assembly, shards, job.execute, "wrote", take, totals.events, before="shards have been written")
    return tuple(entry for entry, _ in results), pa.concat_tables([index for _, index in results])
