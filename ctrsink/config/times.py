"""Moments as whole seconds since 1970: what stands for one in a configuration and in a log."""

import re
from datetime import UTC, date, datetime, timedelta
from typing import Annotated, Any

from pydantic import BeforeValidator

EARLIEST = -62_135_596_800  # the year 1
LATEST = 10**11  # the year 5138; what lies beyond was counted in milliseconds

_ISO = re.compile(r"(\d{4}-\d\d-\d\d)(?:[T ](\d\d:\d\d(?::\d\d(?:\.\d+)?)?)(Z|[+-]\d\d(?::?\d\d)?| UTC)?)?", re.ASCII)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def iso_seconds(text: str) -> int | None:
    """Seconds since 1970, rounded down, of a date (its midnight) or a time as ISO 8601 writes it, in UTC where it names no zone.

    None where `text` is neither.
    """
    found = _ISO.fullmatch(text.strip())
    if found is None:
        return None
    day, time, zone = found.groups()
    try:
        parsed = datetime.fromisoformat(f"{day}T{time or '00:00'}{'+00:00' if zone in (None, 'Z', ' UTC') else zone}")
    except ValueError:
        return None
    return (parsed - _EPOCH) // timedelta(seconds=1)


def is_date(number: int) -> bool:
    """Whether a number reads as a date of 1990 to 2099, 20240531, of which no second since 1970 was meant."""
    if not 19_900_101 <= number <= 20_991_231:
        return False
    try:
        date(number // 10_000, number // 100 % 100, number % 100)
    except ValueError:
        return False
    return True


def iso_date(number: int) -> str:
    """20240531 as 2024-05-31."""
    return f"{number // 10_000}-{number // 100 % 100:02}-{number % 100:02}"


def _moment(value: Any) -> int:
    if isinstance(value, date):
        value = value.isoformat()
    found = iso_seconds(value) if isinstance(value, str) else value
    if isinstance(found, bool) or not isinstance(found, int):
        raise ValueError(f"{value!r:.40} is neither a date or time such as 2024-05-31T23:59:59Z nor whole seconds since 1970")
    if is_date(found):
        raise ValueError(f"{found} would be a second of the year 1970: write the date as {iso_date(found)}")
    if not EARLIEST <= found <= LATEST:
        raise ValueError(f"{value!r:.40} is no time in seconds since 1970 (is it in milliseconds?)")
    return found


Moment = Annotated[int, BeforeValidator(_moment)]
"""Whole seconds since 1970; a configuration may give it as a date, its midnight in UTC, or as a time, both in ISO 8601."""
