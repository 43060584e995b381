"""Lines of requests become rows of scores: those of a whole file here, those of a block of one in ctrsink.scoring."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ctrsink import storage, strict_json, terminal
from ctrsink.errors import InputError
from ctrsink.request_lines import OnBadRequest, RequestLine, read_lines
from ctrsink.serve.requests import Request
from ctrsink.serve.scorer import Scorer

log = logging.getLogger("ctrsink.serve")


@dataclass(frozen=True)
class Scored:
    """What some requests got."""

    rows: list[dict[str, Any]]
    """Of each, in their order, `probabilities` or an `error`, and its `id` if it has one."""
    requests: int
    candidates: int
    problems: list[str]
    """Of those that were skipped."""


def score_requests(
    scorer: Scorer, lines: list[RequestLine], on_bad_request: OnBadRequest, place: Callable[[str], str] = str
) -> Scored:
    """Score some requests, one by one: a request's probabilities do not depend on the others.

    Args:
        place: makes of a line's `where` what a message says of it.

    Raises:
        InputError: a request cannot be scored; the message names its line. All are checked before the first is scored.
    """
    problems: dict[int, str] = {}
    requests: dict[int, Request] = {}
    found: dict[int, list[float]] = {}

    @contextmanager
    def judged(number: int) -> Iterator[None]:
        try:
            yield
        except InputError as error:
            where = lines[number].where
            problem = place(where) + str(error).removeprefix(where)
            if on_bad_request == "fail":
                raise InputError(problem) from None
            problems[number] = problem

    for number, line in enumerate(lines):
        with judged(number):
            if line.problem is not None:
                raise InputError(line.problem)
            _check_id(line)
            requests[number] = scorer.parse(line.tree, line.where)
    for number, request in requests.items():
        with judged(number):
            found[number] = scorer.probabilities(request, lines[number].where)
    rows = [
        _named(line.tree) | ({"probabilities": found[number]} if number in found else {"error": problems[number]})
        for number, line in enumerate(lines)
    ]
    told = [problems[number] for number in sorted(problems)]
    return Scored(rows, len(found), sum(map(len, found.values())), told)


def as_jsonl(rows: list[dict[str, Any]]) -> bytes:
    """A JSON object a line."""
    return "".join(strict_json.dumps(row) + "\n" for row in rows).encode()


def score_file(
    folder: str, input_path: str, output: str | None = None, on_bad_request: OnBadRequest = "fail", device: str = "cpu"
) -> dict[str, Any]:
    """Score a file of requests, one JSON object a line, with the model in `folder`; see score_lines."""
    return score_lines(folder, read_lines(input_path, on_bad_request), output, on_bad_request, device)


def score_lines(
    folder: str,
    lines: list[RequestLine],
    output: str | None = None,
    on_bad_request: OnBadRequest = "fail",
    device: str = "cpu",
    base: str | None = None,
) -> dict[str, Any]:
    """Score the requests of a file with the model in `folder`; `base`: see load_model.

    Writes one line per request, `{"probabilities": [...]}` and the request's `id` if it has one, to `output` (a file, local or
    s3://) or to stdout; all at the end, so that bad input leaves nothing behind. A request that is skipped has a line too, with
    an `error`, so that lines stay those of the input.

    Returns:
        Counts of `requests` and `candidates` scored, and how many were `skipped` where that was allowed.

    Raises:
        InputError: a request cannot be scored; the message names its line. Or none of them can.
    """
    scored = score_requests(Scorer.load(folder, device, base), lines, on_bad_request)
    tell_skipped(scored.requests, len(scored.problems), scored.problems[:1])
    content = as_jsonl(scored.rows)
    if output is None:
        terminal.out().write(content.decode())
    else:
        storage.write_bytes(output, content)
    counts = {"requests": scored.requests, "candidates": scored.candidates}
    return counts | ({"skipped": len(scored.problems)} if on_bad_request == "skip" else {})


def tell_skipped(requests: int, skipped: int, first: list[str]) -> None:
    """Warn of `skipped` requests beside those that were scored.

    Raises:
        InputError: none was scored.
    """
    if skipped and not requests:
        raise InputError(f"none of {skipped} requests can be scored; the first: {first[0]}")
    if skipped:
        log.warning("skipped %d of %d requests; the first: %s", skipped, requests + skipped, first[0])


def _named(tree: Any) -> dict[str, Any]:
    """The request's id, to be returned with what it got."""
    name = tree.get("id") if isinstance(tree, dict) else None
    return {"id": name} if name is not None and _is_writable(name) else {}


def _check_id(line: RequestLine) -> None:
    if isinstance(line.tree, dict) and not _is_writable(line.tree.get("id")):
        raise InputError(f"{line.where}: id {line.tree['id']!a} has half of a pair of surrogates: give text")


def _is_writable(name: Any) -> bool:
    """Whether an id can be written as UTF-8; of what is no text JSON's escapes can."""
    try:
        return not isinstance(name, str) or bool(name.encode() or True)
    except UnicodeEncodeError:
        return False
