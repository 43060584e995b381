"""Prepare a log, or append one to a data set: the folder is taken, changed only once all input is good, and tidied."""

import logging

from ctrsink import storage
from ctrsink.config.data import PrepareSpec
from ctrsink.dataset.manifest import MANIFEST_NAME, WORK, Manifest, read_manifest, require_none
from ctrsink.errors import InputError, RunError, first_line
from ctrsink.prepare import encoder, tokenize
from ctrsink.prepare.check_rows import OnBadRow
from ctrsink.prepare.execute import Execute, in_process
from ctrsink.prepare.job import Job
from ctrsink.prepare.sources import open_source
from ctrsink.prepare.statistics import Rule
from ctrsink.prepare.steps import run_steps

log = logging.getLogger("ctrsink.data")


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
        ("columns", sorted(spec.columns), sorted(base.columns)),
        ("request_is_second", spec.request_is_second, base.request_is_second),
    ):
        if wanted != there:
            raise InputError(f"prepare.{name} is not that of the data set {to} ({there}): what is appended must be like it")
    spec = spec.model_copy(update={"columns": base.columns})  # in its order
    if spec.neighbours is not None and base.neighbours is None:
        raise InputError(f"the data set {to} has no table of neighbours: leave out prepare.neighbours, or prepare it again")
    columns = open_source(spec.source).columns
    for name, mapped, there in (
        ("feedback", columns.feedback is not None, kept.outcome == "feedback"),
        ("label", columns.label is not None, base.labelled),
    ):
        if mapped != there:
            both = ("has one", "has none") if there else ("has none", "has one")
            raise InputError(
                f"prepare.source.columns.{name}: the data set {to} {both[0]}, what is appended {both[1]}: map what it has"
            )
    if spec.past_events < 2 * kept.user_events:
        log.warning(
            "prepare.past_events %d is less than twice prepare.statistics.user_events %d: some signals of users who come back "
            "are of fewer events than before; raise past_events if the model is told any",
            spec.past_events,
            kept.user_events,
        )
    return _build(spec, to, base, on_bad_row, execute)


def _build(spec: PrepareSpec, to: str, base: Manifest | None, on_bad_row: OnBadRow, execute: Execute) -> Manifest:
    work = storage.join(to, WORK)
    going_on = storage.exists(work)
    try:
        _refuse_foreign_folders(to)
        manifest = run_steps(Job(spec, to, work, base, execute), on_bad_row)
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


def _refuse_foreign_folders(to: str) -> None:
    """A folder without a manifest of ours, and without work of ours, keeps what is in it."""
    if any(storage.exists(storage.join(to, name)) for name in (MANIFEST_NAME, WORK)):
        return
    for name in ("shards", tokenize.FOLDER, encoder.FOLDER):
        if storage.exists(storage.join(to, name)):
            raise InputError(f"{to} holds a folder {name} that is not a data set's: choose another folder, or remove it")


def _clear(to: str, work: str) -> None:
    """Remove the work folder, and the data set's where that leaves it empty. A task elsewhere may still write there."""
    try:
        storage.delete(work)
        if not storage.is_remote(to) and not storage.list_files(to) and not storage.list_dirs(to):
            storage.delete(to)
    except (OSError, InputError, RunError) as error:
        log.warning("%s could not be removed (%s): it is of no use any more", work, first_line(error))
