"""Prepare a log, or append one to a data set: what the tasks of partition.py and assemble.py do is put in order here."""

import io
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from ctrsink import __version__, storage
from ctrsink.config.data import PrepareSpec
from ctrsink.data import chronology, encoder, tokenize
from ctrsink.data.arrow import to_parquet
from ctrsink.data.events import OnBadRow
from ctrsink.data.manifest import (
    FORMAT,
    MANIFEST_NAME,
    WORK,
    EncoderEntry,
    Manifest,
    PartEntry,
    ShardEntry,
    read_file,
    read_manifest,
    require_none,
)
from ctrsink.data.prepare.assemble import Assembly, put
from ctrsink.data.prepare.execute import Execute, in_process
from ctrsink.data.prepare.items import Items
from ctrsink.data.prepare.partition import Partition
from ctrsink.data.prepare.past import Past
from ctrsink.data.prepare.places import Places
from ctrsink.data.prepare.progress import Done, reported
from ctrsink.data.prepare.survey import Totals, count_splits, split_times
from ctrsink.data.prepare.vectors import Encoding
from ctrsink.data.render import feedback_table
from ctrsink.data.sources import open_source
from ctrsink.errors import InputError, RunError, first_line

log = logging.getLogger("ctrsink.data")
_ROW_BYTES = 32  # of a log, about: only to guess how finely blocks are sliced
_MAX_SLICES = 1024


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
    for name, wanted, there in (("text", spec.text, base.text), ("positive_from", spec.positive_from, base.positive_from)):
        if wanted != there:
            raise InputError(f"prepare.{name} is not that of the data set {to} ({there}): what is appended must be like it")
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
    log.info("%s now holds %d events of %d users in %d shards", to, manifest.events, manifest.users, len(manifest.shards))
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
        source = open_source(self.spec.source)
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
        label_rule = (self.spec.text, self.spec.positive_from)
        partition = Partition(
            spec=self.spec,
            source=source,
            blocks=blocks,
            folder=self._folder("blocks", self.spec.source, *label_rule, blocks, versions, welcome, slices),
            slices=slices,
            items=welcome,
        )
        totals = self._read(partition)
        surveys = lambda: (partition.survey(number) for number in range(len(blocks)))  # noqa: E731
        self._check(totals)
        times = split_times(totals, surveys, self.spec.split)
        splits = count_splits(surveys(), times)
        chronology.check_splits(splits, self.spec.split)

        if listed is None:
            found = pa.table({"item": pa.array(sorted(totals.items), pa.string())})
            items = Items.of(found, self.spec.text) if items is None else items.extended(found, self.spec.text)
        assert items is not None
        texts = feedback_table(self.spec.text, self.base.feedback_texts if self.base else (), totals.feedback)
        tokenizer = tokenizer or tokenize.make_tokenizer(self.spec.tokenizer, [*items.texts, *texts])
        ids = items.write_ids(self.work)
        tokens = items.write_tokens(self.work, tokenizer, self.spec.text.max_item_tokens)
        vectors = encoding and encoding.write_vectors(self.to, self.work, items, self.execute, self._folder)
        ranges = tuple(chronology.cut_shards(totals.prefix_events, self.spec.shard_events))
        past = Past(self.to, self.base, self.spec.past_events) if self.base else None
        assembly = Assembly(
            partition=partition,
            to=self.to,
            folder=self._folder("shards", partition.folder, ranges, times, texts, ids, tokens, vectors, past),
            slice_ends=tuple(survey.slice_ends for survey in surveys()),
            ranges=ranges,
            split_times=times,
            feedback_texts=texts,
            items=ids,
            tokens=tokens,
            vectors=vectors,
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
        part = PartEntry(
            split_times=times,
            splits=splits,
            users=index.num_rows,
            events=totals.events,
            first_time=totals.first_time,
            last_time=totals.last_time,
            skipped_rows=totals.rows - totals.events,
            past_events=self.spec.past_events if self.base else 0,
        )
        encoded = encoding and vectors and encoding.entry(self.to, vectors)
        return self._manifest(part, shards, index, items, tokenizer, encoded or None, texts)

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
                if where and self.on_bad_row == "fail":
                    raise InputError(f"{where}; correct it, or leave bad rows out with --on-bad-row skip")
                if where:
                    log.warning("%s: skipped %d bad rows; the first: %s", block.file, survey.rows - survey.events, where)
                totals.add(survey)
                yield Done(block.end - block.start, survey.rows, number in done)

        for _ in reported(surveys(), sum(block.end - block.start for block in blocks), "read"):
            pass
        return totals

    def _check(self, totals: Totals) -> None:
        path = self.spec.source.path
        if not totals.events:
            reason = f"all {totals.rows} rows are bad" if totals.rows else "it has no row"
            raise InputError(f"the event log {path} holds no event: {reason}")
        if not totals.impressions:
            raise InputError(f"no event of {path} has a label: map source.columns.label or source.columns.feedback")
        if self.base is not None and totals.first_time <= self.base.parts[-1].last_time:
            raise InputError(
                f"{path} begins at {totals.first_time}, but the data set {self.to} reaches to {self.base.parts[-1].last_time} "
                "(seconds since 1970): append events that are newer than all there are"
            )

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
            prefix_tokens=tuple(tokenize.prefix_tokens(tokenizer, self.spec.text.prefix)),
            feedback_texts=texts,
            feedback_tokens=tuple(tuple(ids) for ids in tokenize.encode(tokenizer, list(texts))),
            item_count=items.table.num_rows,
        )


def _slices(log_bytes: int, shard_events: int) -> int:
    """Slices of a block's file: about twice as many as there will be shards, so that a shard reads little in vain."""
    shards = log_bytes / _ROW_BYTES / shard_events
    return next(2**power for power in count() if 2**power >= min(2 * shards, _MAX_SLICES))
