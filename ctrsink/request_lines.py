"""A file of requests, one JSON object a line: read before a model is loaded, so that what is no JSON is refused at once."""

import json
from dataclasses import dataclass
from typing import Any, Literal

from ctrsink import storage, strict_json
from ctrsink.errors import InputError

OnBadRequest = Literal["fail", "skip"]


@dataclass(frozen=True)
class RequestLine:
    """One line of such a file."""

    where: str
    """The file and the line, for messages."""
    tree: Any
    problem: str | None = None
    """Why it is no JSON."""


def read_lines(path: str, on_bad_request: OnBadRequest = "fail") -> list[RequestLine]:
    """The lines of the file, local or s3://; empty ones at its end are no requests.

    Raises:
        InputError: there is no such file, or nothing in it, or a line is no JSON and bad ones are not to be skipped.
    """
    try:
        found = parse_lines(storage.read_bytes(path), path)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: give a file with one request a line") from None
    if not found:
        raise InputError(f"{path} is empty: give one request a line")
    if on_bad_request == "fail":
        for line in found:
            if line.problem is not None:
                raise InputError(line.problem)
    return found


def parse_lines(content: bytes, path: str, first: int = 0, last: bool = True) -> list[RequestLine]:
    """The lines of a file, or of a piece of it whose first line has `first` lines before it.

    Args:
        last: nothing follows: empty lines at the end are no requests.
    """
    lines = content.split(b"\n")
    if not lines[-1]:  # behind the last line break
        lines.pop()
    while last and lines and not lines[-1].strip():
        lines.pop()
    return [_read(line, f"{path}, line {number}") for number, line in enumerate(lines, first + 1)]


def require_model(uri: str) -> None:
    """Raise InputError where the folder `uri` holds no model at all; whether it can score is seen when it is loaded."""
    if not storage.exists(storage.join(uri, "config.json")):
        raise InputError(f"{uri} holds no model: write one there with `ctrsink export`")


def _read(line: bytes, where: str) -> RequestLine:
    try:
        return RequestLine(where, json.loads(line, object_pairs_hook=strict_json.once))
    except strict_json.Twice as error:
        return RequestLine(where, None, f"{where}: {error}")
    except (ValueError, RecursionError) as error:  # of JSON or of UTF-8
        return RequestLine(where, None, f"{where}: not a JSON object ({error})")
