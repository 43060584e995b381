"""Requests of any number become a folder of scores, block by block; a second call does what the first has left."""

import logging
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from ctrsink import __version__, storage
from ctrsink.errors import InputError, RunError
from ctrsink.prepare.execute import Execute, run_tasks
from ctrsink.request_lines import OnBadRequest
from ctrsink.scoring.blocks import Block, cut_files
from ctrsink.scoring.files import RequestFile, is_folder, request_files
from ctrsink.scoring.parts import Counts, Form, Parts, as_parquet
from ctrsink.scoring.reader import Reader, common_id_type

if TYPE_CHECKING:
    from ctrsink.serve.scorer import Scorer

log = logging.getLogger("ctrsink.serve")


@dataclass(frozen=True)
class ScoreJob:
    """What to score, by which model, and where the scores go."""

    model: str
    input: str
    """A file, a folder or a pattern, see request_files."""
    to: str
    form: Form = "parquet"
    on_bad_request: OnBadRequest = "fail"
    block_bytes: int = 4 << 20
    device: str = "cpu"
    base: str | None = None
    """Of an adapter, see load_model; a base that differs is refused there, so it is no setting."""

    def run(self, execute: Execute) -> dict[str, Any]:
        """Score what is not scored yet; returns counts of all of it.

        Raises:
            InputError: the folder `to` is not of this job; or a request cannot be scored, and what was scored before stays.
        """
        files = request_files(self.input)
        if is_folder(self.input) and f"{storage.absolute(self.to)}/".startswith(f"{storage.absolute(self.input).rstrip('/')}/"):
            raise InputError(f"--output {self.to} lies in the input {self.input}: choose another folder")
        parts, settings = Parts(self.to, self.form), self._settings(files)
        blocks = cut_files(files, self.block_bytes)
        new = parts.claim(settings)
        task = ScoreBlocks(self, files, blocks, parts, tuple(map(tuple, settings["model"])), common_id_type(files))
        total = Counts()

        def take(number: int) -> tuple[float, int]:
            nonlocal total
            counts = parts.counts(number)
            total += counts
            return blocks[number].bytes, counts.requests + counts.skipped

        try:
            size = sum(block.bytes for block in blocks)
            run_tasks(task, len(blocks), execute, "scored", take, size, "parts have been scored", "requests")
        except BaseException:
            with suppress(InputError, RunError, OSError):  # what ended the job is told
                if new and not parts.done():
                    parts.forget()
            raise
        return self._told(parts, settings, total, len(blocks))

    def _settings(self, files: list[RequestFile]) -> dict[str, Any]:
        """All that scores depend on."""
        model = [[file.path, file.bytes, file.version] for file in storage.find(self.model)]
        return {
            "ctrsink": __version__,
            "input": [[storage.absolute(file.uri), file.bytes, file.version] for file in files],
            "model": model,
            "device": self.device,
            "block_bytes": self.block_bytes,
            "parts": self.form,
        }

    def _told(self, parts: Parts, settings: dict[str, Any], total: Counts, count: int) -> dict[str, Any]:
        from ctrsink.serve.lines import tell_skipped

        first = [total.first] if total.first is not None else []
        if first and self.on_bad_request == "fail":
            raise InputError(f"{self.to} has {total.skipped} requests that an earlier call skipped; the first: {first[0]}")
        tell_skipped(total.requests, total.skipped, first)
        if (now := self._settings(request_files(self.input))) != settings:
            changed = ", ".join(key for key in settings if settings[key] != now[key])
            raise InputError(f"{changed} changed while it was scored: delete {self.to} and score again")
        parts.succeed(total)
        counts = {"requests": total.requests, "candidates": total.candidates}
        return counts | ({"skipped": total.skipped} if self.on_bad_request == "skip" else {}) | {"parts": count}


@dataclass(frozen=True)
class ScoreBlocks:
    """The task that scores a block; a process loads the model once, for all of its blocks."""

    job: ScoreJob
    files: list[RequestFile]
    blocks: list[Block]
    parts: Parts
    model: tuple[tuple[Any, ...], ...]
    """The model's files: one that was exported anew at the same place is loaded anew."""
    ids: pa.DataType
    """Of the column id in parts of Parquet."""

    def done(self) -> set[int]:
        """Blocks that are scored."""
        return self.parts.done()

    def __call__(self, number: int) -> int:
        """Score block `number` and put its part; returns how many requests it has."""
        from ctrsink.serve.lines import as_jsonl, score_requests

        block, reader = self.blocks[number], _reader(tuple(self.files))
        scorer = _scorer(self.job.model, self.job.device, self.job.base, self.model)
        lines = reader.read(block)
        try:
            found = score_requests(scorer, lines, self.job.on_bad_request, lambda where: reader.place(where, block))
        except InputError as error:
            hint = f"what was scored stays in {self.job.to}, and --on-bad-request skip goes on with it"
            raise InputError(f"{error}; {hint}") from None
        counts = Counts(found.requests, found.candidates, len(found.problems), next(iter(found.problems), None))
        content = as_parquet(found.rows, self.ids) if self.job.form == "parquet" else as_jsonl(found.rows)
        self.parts.write(number, content, counts)
        return len(lines)


@lru_cache(maxsize=1)
def _reader(files: tuple[RequestFile, ...]) -> Reader:
    return Reader(list(files))


@lru_cache(maxsize=1)
def _scorer(model: str, device: str, base: str | None, files: tuple[tuple[Any, ...], ...]) -> "Scorer":
    from ctrsink.serve.scorer import Scorer

    return Scorer.load(model, device, base)
