"""Prepare a log, or append one to a data set: what the tasks of partition.py and assemble.py do is put in order here."""

import io
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, count
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from ctrsink import __version__, storage
from ctrsink.config.data import PrepareSpec
from ctrsink.data import chronology, encoder, tokenize
from ctrsink.data.arrow import to_parquet
from ctrsink.data.cells import iso
from ctrsink.data.events import OnBadRow, forms_of
from ctrsink.data.manifest import (
    FORMAT,
    MANIFEST_NAME,
    WORK,
    EncoderEntry,
    Manifest,
    NeighboursEntry,
    PartEntry,
    Scale,
    ShardEntry,
    StatisticsEntry,
    read_file,
    read_manifest,
    require_none,
)
from ctrsink.data.prepare.assemble import Assembly, put
from ctrsink.data.prepare.execute import Execute, in_process
from ctrsink.data.prepare.items import Items
from ctrsink.data.prepare.moments import Moments
from ctrsink.data.prepare.neighbours import Pairing, cut_items, mean_square
from ctrsink.data.prepare.partition import Partition
from ctrsink.data.prepare.past import Past
from ctrsink.data.prepare.places import Places
from ctrsink.data.prepare.progress import Done, reported
from ctrsink.data.prepare.repeats import Repeats
from ctrsink.data.prepare.statistics import Received, Rule, counts_in, totals_as_counts
from ctrsink.data.prepare.survey import FAR_YEARS, Survey, Totals, count_splits, split_times
from ctrsink.data.prepare.vectors import Encoding
from ctrsink.data.render import feedback_table, template_fields
from ctrsink.data.shard import Counted, Knowing
from ctrsink.data.sources import open_source
from ctrsink.errors import InputError, RunError, first_line
from ctrsink.features.registry import Need, numbers_with

log = logging.getLogger("ctrsink.data")
_ROW_BYTES = 32  # of a log, about: only to guess how finely blocks are sliced
_MAX_SLICES = 1024
_REASONS = 8  # for which rows are bad, that are told at most


def prepare(
    spec: PrepareSpec, to: str, on_bad_row: OnBadRow = "fail", overwrite: bool = False, execute: Execute = in_process
) -> Manifest:
    """Prepare the log that `spec` names as a data set in the folder `to`, local or s3://.

    The same log and `spec` give the same bytes, however the log is cut into blocks and by whomever they are read. Without a
    manifest a folder is no data set, so an interrupted preparation leaves none behind; called again, it goes on from the tasks
    that were done.

    Raises:
        InputError: the log or the configuration cannot be used, or `to` holds a data set and `overwrite` is not set.
    """
    if not overwrite:
        require_none(to)
    return _build(spec, to, None, on_bad_row, execute)


def append(spec: PrepareSpec, to: str, on_bad_row: OnBadRow = "fail", execute: Execute = in_process) -> Manifest:
    """Append the log that `spec` names, newer than all there is, as a new part to the data set `to`.

    Chronologies of the new shards begin with their users' latest `spec.past_events` events, as history. Nothing that the data set
    holds changes, and readers of the old manifest are not disturbed. Tokenizer, encoder, templates and label rule are the data
    set's.

    Raises:
        InputError: there is no data set, the log or the configuration cannot be used, or an event is not newer.
        RunError: another preparation changed the data set meanwhile.
    """
    base = read_manifest(to)
    if spec.source.kind == "mind":
        raise InputError("MIND cannot be appended, because its rows repeat earlier clicks: prepare all its folders together")
    rule, kept = Rule.of(spec.statistics), base.statistics
    for name, wanted, there in (
        ("text", spec.text, base.text),
        ("positive_from", spec.positive_from, base.positive_from),
        ("statistics.period", rule.period_s, kept.period_s),
        ("statistics.strength", rule.strength, kept.strength),
        ("statistics.user_events", spec.statistics.user_events, kept.user_events),
        ("statistics.fields", spec.statistics.fields, kept.fields),
    ):
        if wanted != there:
            raise InputError(f"prepare.{name} is not that of the data set {to} ({there}): what is appended must be like it")
    if spec.past_events < kept.user_events:
        log.warning(
            "prepare.past_events %d is less than prepare.statistics.user_events %d: signals of users who come back are of fewer "
            "events than before; raise past_events if the model is told any",
            spec.past_events,
            kept.user_events,
        )
    return _build(spec, to, base, on_bad_row, execute)


def _build(spec: PrepareSpec, to: str, base: Manifest | None, on_bad_row: OnBadRow, execute: Execute) -> Manifest:
    work = storage.join(to, WORK)
    going_on = storage.exists(work)
    try:
        manifest = _Build(spec, to, work, base, on_bad_row, execute).run()
    except FileNotFoundError as error:
        raise RunError(f"{error.filename or work} vanished: does something else prepare {to} too? Run this again") from None
    except InputError as error:
        # What bad input left behind is of no use. What an interruption or an outage left is, to the next attempt.
        if not going_on and not isinstance(error, storage.StorageUnavailable):
            _clear(to, work)
        raise
    if base is not None and read_manifest(to) != base:
        raise RunError(f"{to} was changed by another preparation while this one ran: run this again")
    storage.write_bytes(storage.join(to, MANIFEST_NAME), (manifest.model_dump_json(indent=1) + "\n").encode())
    _clear(to, work)
    log.info("%s now holds %d events of %s in %d shards", to, manifest.events, manifest.people, len(manifest.shards))
    return manifest


def _clear(to: str, work: str) -> None:
    """Remove the work folder, and the data set's where that leaves it empty. A task elsewhere may still write there."""
    try:
        storage.delete(work)
        if not storage.is_remote(to) and not storage.list_files(to) and not storage.list_dirs(to):
            storage.delete(to)
    except (OSError, InputError, RunError) as error:
        log.warning("%s could not be removed (%s): it is of no use any more", work, first_line(error))


@dataclass(frozen=True)
class _Build:
    spec: PrepareSpec
    to: str
    work: str
    base: Manifest | None
    on_bad_row: OnBadRow
    execute: Execute

    def run(self) -> Manifest:
        self._refuse_foreign_folders()
        source = open_source(self.spec.source, template_fields(self.spec.text.item))
        listed = source.items()
        blocks = tuple(source.blocks(self.spec.block_bytes))
        # A tokenizer or an encoder that cannot be had is found before hours of work.
        tokenizer = self._given_tokenizer()
        encoding = Encoding.of(self.spec.encoder, self.to, self.work, self.base)
        items = Items.of(listed, self.spec.text) if listed is not None else None
        if self.base is not None:
            old = Items(pq.read_table(io.BytesIO(read_file(self.to, self.base.items))))
            items = old if listed is None else old.extended(listed, self.spec.text)
        welcome = items.write_ids(self.work) if items is not None and listed is not None else None
        versions = {block.file: storage.info(block.file) for block in blocks}
        slices = _slices(sum(info.bytes for info in versions.values()), self.spec.shard_events)
        label_rule = (self.spec.text, self.spec.positive_from, self.spec.statistics)
        partition = Partition(
            spec=self.spec,
            source=source,
            blocks=blocks,
            folder=self._folder("blocks", self.spec.source, *label_rule, blocks, versions, welcome, slices),
            slices=slices,
            items=welcome,
        )
        totals = self._read(partition)
        self._check(totals)
        self._warn_of_forms(totals, items)
        slice_ends = tuple(partition.survey(number).slice_ends for number in range(len(blocks)))
        repeats = self._repeats(partition, slice_ends, totals)

        def surveys() -> Iterator[Survey]:
            yield from (partition.survey(number) for number in range(len(blocks)))
            yield from repeats.surveys() if repeats else ()

        times = split_times(totals, surveys, self.spec.split)
        splits = count_splits(surveys(), times)
        chronology.check_splits(splits, self.spec.split, totals.first_time, totals.last_time)

        if listed is None:
            found = pa.table({"item": pa.array(sorted(totals.items), pa.string())})
            items = Items.of(found, self.spec.text) if items is None else items.extended(found, self.spec.text)
        assert items is not None
        texts = feedback_table(self.spec.text, self.base.feedback_texts if self.base else (), totals.feedback)
        tokenizer = tokenizer or tokenize.make_tokenizer(self.spec.tokenizer, [*items.vocabulary_texts(), *texts])
        ids = items.write_ids(self.work)
        tokens = items.write_tokens(self.work, tokenizer, self.spec.text)
        fields = items.write_fields(self.work, self.spec.statistics.fields)
        received = self._received(partition, repeats, items)
        content = received.to_bytes()
        received_path = storage.join(self.work, f"received-{storage.sha256(content)[:16]}.arrow")
        storage.write_bytes(received_path, content)
        vectors = encoding and encoding.write_vectors(self.to, self.work, items, self.execute, self._folder)
        ranges = tuple(chronology.cut_shards(totals.prefix_events, self.spec.shard_events))
        past = Past(self.to, self.base, self.spec.past_events) if self.base else None
        table = self.spec.neighbours if self.base is None else None
        counted = Counted(times.train_end, table.user_events) if table else None
        assembly = Assembly(
            partition=partition,
            to=self.to,
            folder=self._folder(
                "shards",
                partition.folder,
                ranges,
                times,
                texts,
                ids,
                tokens,
                vectors,
                past,
                self.spec.duplicates,
                fields,
                received_path,
                counted,
            ),
            slice_ends=slice_ends,
            ranges=ranges,
            split_times=times,
            feedback_texts=texts,
            items=ids,
            tokens=tokens,
            vectors=vectors,
            fields=fields,
            received=received_path,
            counted=counted,
            part=len(self.base.parts) if self.base else 0,
            first_shard=len(self.base.shards) if self.base else 0,
            past=past,
        )
        if self.base is None and not assembly.done():
            # Only now, with all the input good, is anything at the place changed. Entries that an attempt with another
            # configuration left speak of shards that are gone then.
            stale = [name for name in storage.list_dirs(self.work) if name.startswith("shards-")]
            for old_file in (
                MANIFEST_NAME,
                *(storage.join(WORK, name) for name in stale),
                "shards",
                tokenize.FOLDER,
                encoder.FOLDER,
            ):
                storage.delete(storage.join(self.to, old_file))
        shards, index = self._write(assembly, totals)
        written = sum(entry.events for entry in shards)
        if written != totals.events:
            raise RunError(f"{written} of {totals.events} events reached the shards of {self.to}: remove {self.work} and repeat")
        duplicates = sum(entry.duplicates for entry in shards)
        self._tell_duplicates(duplicates, totals.events)
        part = PartEntry(
            split_times=times,
            splits=splits,
            users=index.num_rows,
            events=totals.events,
            first_time=totals.first_time,
            last_time=totals.last_time,
            skipped_rows=totals.rows - totals.events,
            duplicates=duplicates,
            duplicates_dropped=self.spec.duplicates == "drop",
            past_events=self.spec.past_events if self.base else 0,
        )
        encoded = encoding and vectors and encoding.entry(self.to, vectors)
        statistics = self._statistics(partition, received, items.table.num_rows)
        neighbours = self.base.neighbours if self.base else self._neighbours(assembly, items.table.num_rows)
        numbers = self.base.numbers if self.base else self._numbers(assembly, shards, statistics, neighbours)
        return self._manifest(
            part,
            shards,
            index,
            items,
            tokenizer,
            encoded or None,
            texts,
            source.columns.label is not None,
            statistics=statistics,
            neighbours=neighbours,
            numbers=numbers,
        )

    def _folder(self, name: str, *facts: object) -> str:
        """Below the work folder, a name that depends on all that the results there depend on."""
        return storage.join(self.work, f"{name}-{storage.sha256(repr((__version__, FORMAT, facts)).encode())[:16]}")

    def _refuse_foreign_folders(self) -> None:
        """A folder without a manifest of ours, and without work of ours, keeps what is in it."""
        if any(storage.exists(storage.join(self.to, name)) for name in (MANIFEST_NAME, WORK)):
            return
        for name in ("shards", tokenize.FOLDER, encoder.FOLDER):
            if storage.exists(storage.join(self.to, name)):
                raise InputError(f"{self.to} holds a folder {name} that is not a data set's: choose another folder, or remove it")

    def _given_tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The one that there is, or None where it is to be trained on the texts of this log."""
        if self.base is not None:
            return tokenize.load_tokenizer(self.to, self.base)
        return tokenize.make_tokenizer(self.spec.tokenizer, []) if self.spec.tokenizer.path is not None else None

    def _read(self, partition: Partition) -> Totals:
        """Run the first tasks; a bad row ends it as soon as it is known which is the first."""
        blocks, done = partition.blocks, partition.done()
        if done:
            log.info("going on: %d of %d blocks have been read before", len(done), len(blocks))
        totals, places = Totals(), Places()

        def surveys() -> Iterator[Done]:
            running = self.execute(partition, [n for n in range(len(blocks)) if n not in done])
            for number, block in enumerate(blocks):
                if number not in done:
                    next(running)
                survey = partition.survey(number)
                where = places.next(block.file, survey.file_rows, survey.header_lines, survey.problem)
                if where and survey.problem and survey.problem.of_file:
                    raise InputError(where)
                if where and self.on_bad_row == "fail":
                    raise InputError(f"{where}; correct it, or leave bad rows out with --on-bad-row skip")
                if where:
                    log.warning("%s: skipped %d bad rows; the first: %s", block.file, survey.rows - survey.events, where)
                totals.add(survey)
                yield Done(block.end - block.start, survey.rows, number in done)

        for _ in reported(surveys(), sum(block.end - block.start for block in blocks), "read"):
            pass
        return totals

    def _repeats(self, partition: Partition, slice_ends: tuple[np.ndarray, ...], totals: Totals) -> Repeats | None:
        """Where events that were logged again are to be dropped: find them and take them off `totals`."""
        if self.spec.duplicates == "keep":
            return None
        ranges = tuple(chronology.cut_shards(totals.prefix_events, self.spec.shard_events))
        repeats = Repeats(partition, self._folder("repeats", partition.folder, ranges), slice_ends, ranges)
        repeats.run(self.execute)
        for survey in repeats.surveys():
            totals.add(survey)
        return repeats

    def _tell_duplicates(self, duplicates: int, events: int) -> None:
        if duplicates:
            drop = self.spec.duplicates == "drop"
            log.warning(
                "%s: %d of %d events were logged before with the same user, item, time, feedback, label and request: %s",
                self.spec.source.path,
                duplicates,
                events + duplicates * drop,
                "left out" if drop else "they are kept, prepare.duplicates=drop takes each event once",
            )

    def _check(self, totals: Totals) -> None:
        path, skipped = self.spec.source.path, totals.rows - totals.events
        reasons = "; ".join(f"{count} rows: {reason}" for reason, count in totals.reasons.most_common(_REASONS))
        if not totals.events:
            reason = f"all {totals.rows} rows are bad ({reasons})" if totals.rows else "it has no row"
            raise InputError(f"the event log {path} holds no event: {reason}")
        if not totals.impressions:
            raise InputError(f"no event of {path} has a label: map source.columns.label or source.columns.feedback")
        if self.base is not None and totals.first_time <= self.base.parts[-1].last_time:
            raise InputError(
                f"{path} begins at {totals.first_time}, but the data set {self.to} reaches to {self.base.parts[-1].last_time} "
                "(seconds since 1970): append events that are newer than all there are"
            )
        if 10 * skipped > totals.rows:
            log.warning(
                "%s: left out %d of %d rows (%.0f %%): %s", path, skipped, totals.rows, 100 * skipped / totals.rows, reasons
            )
        median, strays = totals.strays()
        if strays:
            log.warning(
                "%s: %d of %d events (%.2g %%) lie more than %d years from the median, %s; the first is of %s, the last of %s: "
                "correct their times if they are none",
                path,
                strays,
                totals.events,
                100 * strays / totals.events,
                FAR_YEARS,
                iso(median)[:10],
                iso(totals.first_time),
                iso(totals.last_time),
            )

    def _warn_of_forms(self, totals: Totals, items: Items | None) -> None:
        """Ids that are whole numbers are written in one way, here and in the data set that is appended to."""
        columns = self.spec.source.columns
        if self.base is not None and items is not None and any(totals.forms.values()):
            newest = pq.read_table(io.BytesIO(read_file(self.to, self.base.shards[-1].events_file)), columns=["user"])
            for name, ids in ((columns.user, newest.column("user")), (columns.item, items.ids)):
                totals.forms[name] = forms_of(ids) | totals.forms.get(name, {})
        for name, found in totals.forms.items():
            if len(found) > 1:
                log.warning(
                    "%s, column %s: ids are written as %s and as %s; as text, 5.0 and 5 are two ids: write them without .0",
                    self.spec.source.path, name, found["fraction"], found["whole"],
                )  # fmt: skip

    def _write(self, assembly: Assembly, totals: Totals) -> tuple[tuple[ShardEntry, ...], pa.Table]:
        """Run the second tasks."""
        shards, done = range(len(assembly.ranges)), assembly.done()
        if done:
            log.info("going on: %d of %d shards have been written before", len(done), len(shards))
        running = self.execute(assembly, [n for n in shards if n not in done])
        results: list[tuple[ShardEntry, pa.Table]] = []

        def finished() -> Iterator[Done]:
            for number in shards:
                if number not in done:
                    next(running)
                results.append(assembly.result(number))
                yield Done(results[-1][0].events, results[-1][0].events, number in done)

        for _ in reported(finished(), totals.events, "wrote"):
            pass
        return tuple(entry for entry, _ in results), pa.concat_tables([index for _, index in results])

    def _manifest(
        self,
        part: PartEntry,
        shards: tuple[ShardEntry, ...],
        index: pa.Table,
        items: Items,
        tokenizer: PreTrainedTokenizerBase,
        encoded: EncoderEntry | None,
        texts: tuple[str, ...],
        labelled: bool,
        **found: Any,
    ) -> Manifest:
        base = self.base
        if base is not None:
            index = pa.concat_tables([pq.read_table(io.BytesIO(read_file(self.to, base.index))), index])
            files = base.tokenizer
        else:
            contents = tokenize.tokenizer_files(tokenizer)
            files = tuple(put(self.to, storage.join(tokenize.FOLDER, name), "", content) for name, content in contents.items())
        return Manifest(
            format=FORMAT,
            parts=(*(base.parts if base else ()), part),
            shards=(*(base.shards if base else ()), *shards),
            index=put(self.to, "index", ".parquet", to_parquet(index), appended=base is not None),
            items=put(self.to, "items", ".parquet", to_parquet(items.table), appended=base is not None),
            tokenizer=files,
            tokenizer_fingerprint=tokenize.fingerprint(tokenizer),
            encoder=encoded,
            text=self.spec.text,
            positive_from=self.spec.positive_from,
            labelled=labelled,
            prefix_tokens=tuple(tokenize.prefix_tokens(tokenizer, self.spec.text.prefix)),
            feedback_texts=texts,
            feedback_tokens=tuple(tuple(ids) for ids in tokenize.encode_own(tokenizer, list(texts))),
            item_count=items.table.num_rows,
            **found,
        )

    def _received(self, partition: Partition, repeats: Repeats | None, items: Items) -> Received:
        """How items were received in the whole log, and in what the data set held before."""
        before = None
        if self.base is not None:
            entry = self.base.statistics
            before = totals_as_counts(read_file(self.to, entry.file), entry.last_period)
        counts = counts_in(partition.folder, len(partition.blocks))
        if repeats is not None:  # what is dropped was counted with the others
            counts = chain(counts, counts_in(repeats.folder, len(repeats.ranges)))
        return Received.of(counts, items.ids, before)

    def _statistics(self, partition: Partition, received: Received, items: int) -> StatisticsEntry:
        table, last = received.totals(items)
        rule = Rule.of(self.spec.statistics)
        return StatisticsEntry(
            period_s=rule.period_s,
            strength=rule.strength,
            user_events=self.spec.statistics.user_events,
            outcome="feedback" if partition.source.columns.feedback is not None else "label",
            fields=self.spec.statistics.fields,
            last_period=last,
            file=put(self.to, "statistics", ".parquet", to_parquet(table), appended=self.base is not None),
        )

    def _neighbours(self, assembly: Assembly, items: int) -> NeighboursEntry | None:
        """Run the third tasks."""
        spec, counted = self.spec.neighbours, assembly.counted
        if spec is None or counted is None:
            return None
        files = tuple(assembly.path(number, "opinions") for number in range(len(assembly.ranges)))
        task = Pairing(self._folder("pairs", assembly.folder, spec), files, items, cut_items(files, items), spec.partners)
        self._run(task, len(task.ranges), "neighbours of ranges of items")
        table = pa.concat_tables([task.result(number) for number in range(len(task.ranges))]).combine_chunks()
        return NeighboursEntry(
            file=put(self.to, "neighbours", ".parquet", to_parquet(table)),
            variance=mean_square(files),
            shrink=spec.shrink,
            until=counted.until,
            user_events=counted.user_events,
        )

    def _numbers(
        self, assembly: Assembly, shards: tuple[ShardEntry, ...], statistics: StatisticsEntry, neighbours: NeighboursEntry | None
    ) -> dict[str, Scale]:
        """Run the last tasks."""
        has: tuple[Need, ...] = (*(["fields"] if statistics.fields else []), *(["neighbours"] if neighbours else []))
        task = Moments(
            folder=self._folder("moments", assembly.folder, neighbours),
            to=self.to,
            shards=shards,
            knowing=Knowing(statistics.outcome, assembly.counted, statistics.user_events),
            neighbours=neighbours,
            split_times=assembly.split_times,
            names=numbers_with(has),
        )
        self._run(task, len(shards), "signals of shards")
        return task.scales()

    def _run(self, task: Pairing | Moments, count: int, what: str) -> None:
        """Run tasks whose results are files, but those that an earlier preparation has run."""
        done = task.done()
        running = self.execute(task, [number for number in range(count) if number not in done])

        def finished() -> Iterator[Done]:
            for number in range(count):
                if number not in done:
                    next(running)
                yield Done(1, 1, number in done)

        for _ in reported(finished(), count, f"computed {what}:"):
            pass


def _slices(log_bytes: int, shard_events: int) -> int:
    """Slices of a block's file: about twice as many as there will be shards, so that a shard reads little in vain."""
    shards = log_bytes / _ROW_BYTES / shard_events
    return next(2**power for power in count() if 2**power >= min(2 * shards, _MAX_SLICES))
