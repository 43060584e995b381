"""Messages of every process on stderr, one line each: text for people, or JSON where CTRSINK_LOG_FORMAT is `json`."""

import json
import logging
import os
import sys
from datetime import UTC, datetime
from typing import Any, TextIO

from tqdm import tqdm

from ctrsink import terminal

FORMAT_VARIABLE = "CTRSINK_LOG_FORMAT"
RELAYED = "relayed"
"""The format of a worker whose messages another process shows, see `relay`."""
_TEXT = "%(asctime)s %(levelname)s %(message)s"
_SENT = ("name", "levelno", "levelname", "created", "rank", "fields", "progress")


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (UTC), level, logger, rank, message, and the fields that the caller gave as `extra`."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self._rank = rank

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        rank = getattr(record, "rank", self._rank)
        row = {"time": when, "level": record.levelname, "logger": record.name, "rank": rank, "message": record.getMessage()}
        fields = getattr(record, "fields", {})
        if told := _exception(self, record):
            fields = {**fields, "exception": told}
        return json.dumps(row | fields, default=str)


class TextFormatter(logging.Formatter):
    """A line with the time of day; of a worker that is not the first with its rank."""

    def __init__(self, rank: int) -> None:
        super().__init__(_TEXT, "%H:%M:%S")
        self._rank = rank

    def format(self, record: logging.LogRecord) -> str:
        rank = getattr(record, "rank", self._rank)
        line = super().format(record)
        return line if rank == 0 else f"{line} (rank {rank})"


class RelayedFormatter(logging.Formatter):
    """A line that `relay` makes a record of again, in the process that has the terminal."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self._rank = rank

    def format(self, record: logging.LogRecord) -> str:
        sent = {name: getattr(record, name) for name in _SENT if hasattr(record, name)}
        told = {"msg": record.getMessage(), "exc_text": _exception(self, record)}
        return terminal.MARK + json.dumps({"rank": self._rank} | sent | told, default=str)


class TerminalHandler(logging.StreamHandler[TextIO]):
    """Lines on the user's stderr. Where that is a terminal, what has `progress` is a bar that stays in its place.

    `progress` of a record is a phase and how much of it is done, 0 to 1.
    """

    def __init__(self) -> None:
        super().__init__(terminal.err())
        self._bar: Any = None
        self._phase = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = terminal.err()
        if not self.stream.isatty():
            super().emit(record)
            return
        phase, share = getattr(record, "progress", ("", 1.0))
        if share < 1:
            if self._bar is None or phase != self._phase:
                self.close_bar()
                shape = "{desc} |{bar:24}| {percentage:3.0f} %"
                self._bar = tqdm(total=1.0, file=self.stream, bar_format=shape, dynamic_ncols=True, leave=False)
                self._phase = phase
            self._bar.n = share
            self._bar.set_description_str(record.getMessage())
            return
        if phase == self._phase:
            self.close_bar()
        tqdm.write(self.format(record), file=self.stream)

    def close_bar(self) -> None:
        """Take the bar off the terminal."""
        if self._bar is not None:
            self._bar.close()
        self._bar, self._phase = None, ""


def configure(level: int = logging.INFO, rank: int = 0) -> None:
    """Send what the package logs at `level` and above to the user's stderr; stdout is left to results."""
    kind = os.environ.get(FORMAT_VARIABLE)
    if kind == RELAYED:
        handler: logging.Handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(RelayedFormatter(rank))
    else:
        handler = TerminalHandler()
        handler.setFormatter(JsonFormatter(rank) if kind == "json" else TextFormatter(rank))
    logger = logging.getLogger("ctrsink")
    logger.setLevel(level)
    logger.propagate = False
    logger.handlers = [handler]


def clear() -> None:
    """Take what moves off the terminal, before something else is printed there."""
    for handler in logging.getLogger("ctrsink").handlers:
        if isinstance(handler, TerminalHandler):
            handler.close_bar()


def of_workers() -> str:
    """What FORMAT_VARIABLE is to be in processes whose stderr somebody brings to this one's."""
    return RELAYED if terminal.is_quiet() else os.environ.get(FORMAT_VARIABLE, "text")


def relay(line: str) -> None:
    """Log here what a worker logged, of the line that RelayedFormatter made; something may have been added at its end."""
    try:
        sent, _ = json.JSONDecoder().raw_decode(line)
        record = logging.makeLogRecord(sent)
    except (ValueError, TypeError):  # cut off
        record = logging.makeLogRecord({"name": "ctrsink", "levelno": logging.INFO, "levelname": "INFO", "msg": line})
    logging.getLogger(record.name).handle(record)


def _exception(formatter: logging.Formatter, record: logging.LogRecord) -> str | None:
    return formatter.formatException(record.exc_info) if record.exc_info else record.exc_text
