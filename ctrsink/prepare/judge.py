"""What a log is refused for once it has been read, and what is strange about it."""

import logging

from ctrsink.config.times import is_date, iso_date
from ctrsink.dataset.arrow import from_parquet
from ctrsink.dataset.cells import iso
from ctrsink.dataset.manifest import read_file
from ctrsink.errors import InputError
from ctrsink.prepare.check_rows import forms_of
from ctrsink.prepare.items import Items
from ctrsink.prepare.job import Job
from ctrsink.prepare.survey import FAR_YEARS, Totals

log = logging.getLogger("ctrsink.data")
_REASONS = 8  # for which rows are bad, that are told at most


def check_totals(job: Job, totals: Totals) -> None:
    """Warn of rows that are bad and of times that are strange.

    Raises:
        InputError: the log holds no event or no label, or begins before the data set that it is appended to ends.
    """
    path, skipped = job.spec.source.path, totals.rows - totals.events
    reasons = "; ".join(f"{count} rows: {reason}" for reason, count in totals.reasons.most_common(_REASONS))
    if not totals.events:
        reason = f"all {totals.rows} rows are bad ({reasons})" if totals.rows else "it has no row"
        raise InputError(f"the event log {path} holds no event: {reason}")
    if not totals.impressions:
        raise InputError(f"no event of {path} has a label: map source.columns.label or source.columns.feedback")
    if job.base is not None and totals.first_time <= job.base.parts[-1].last_time:
        raise InputError(
            f"{path} begins at {totals.first_time}, but the data set {job.to} reaches to {job.base.parts[-1].last_time} "
            "(seconds since 1970): append events that are newer than all there are"
        )
    if 10 * skipped > totals.rows:
        log.warning("%s: left out %d of %d rows (%.0f %%): %s", path, skipped, totals.rows, 100 * skipped / totals.rows, reasons)
    if is_date(totals.first_time) and is_date(totals.last_time):
        log.warning(
            "%s: the events are of the seconds %d to %d since 1970, in that year: if these are dates, write them as %s",
            path,
            totals.first_time,
            totals.last_time,
            iso_date(totals.last_time),
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


def warn_of_forms(job: Job, totals: Totals, items: Items | None) -> None:
    """Ids that are whole numbers are written in one way, here and in the data set that is appended to."""
    columns = job.spec.source.columns
    if job.base is not None and items is not None and any(totals.forms.values()):
        newest = from_parquet(read_file(job.to, job.base.shards[-1].events_file), columns=["user"])
        for name, ids in ((columns.user, newest.column("user")), (columns.item, items.ids)):
            totals.forms[name] = forms_of(ids) | totals.forms.get(name, {})
    for name, found in totals.forms.items():
        if len(found) > 1:
            log.warning(
                "%s, column %s: ids are written as %s and as %s; as text, 5.0 and 5 are two ids: write them without .0",
                job.spec.source.path,
                name,
                found["fraction"],
                found["whole"],
            )


def warn_of_duplicates(job: Job, duplicates: int, events: int) -> None:
    """Say how many events were logged again, and what became of them.

    Args:
        events: those that the data set took.
    """
    if duplicates:
        drop = job.spec.duplicates == "drop"
        log.warning(
            "%s: %d of %d events were logged before with the same user, item, time, feedback, label and request: %s",
            job.spec.source.path,
            duplicates,
            events + duplicates * drop,
            "left out" if drop else "they are kept, prepare.duplicates=drop takes each event once",
        )
