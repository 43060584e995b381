"""Messages of every process on stderr, one line each: text for people, or JSON where CTRSINK_LOG_FORMAT is `json`."""

import json
import logging
import os
import sys
from datetime import UTC, datetime

FORMAT_VARIABLE = "CTRSINK_LOG_FORMAT"


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (UTC), level, logger, rank, message, and the fields that the caller gave as `extra`."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self._rank = rank

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        row = {"time": when, "level": record.levelname, "logger": record.name, "rank": self._rank, "message": record.getMessage()}
        fields = getattr(record, "fields", {})
        if record.exc_info:
            fields = {**fields, "exception": self.formatException(record.exc_info)}
        return json.dumps(row | fields, default=str)


def configure(level: int = logging.INFO, rank: int = 0) -> None:
    """Send what the package logs at `level` and above to stderr; stdout is left to results."""
    handler = logging.StreamHandler(sys.stderr)
    if os.environ.get(FORMAT_VARIABLE) == "json":
        handler.setFormatter(JsonFormatter(rank))
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    logger = logging.getLogger("ctrsink")
    logger.setLevel(level)
    logger.propagate = False
    logger.handlers = [handler]
