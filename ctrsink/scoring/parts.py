"""The folder of scores: a part for each block of the requests, what it holds, and what all of it was made from.

```
TO/_scores.json               what was scored, by what, how: written first
TO/part-000012.parquet        rows of block 12 (or .jsonl), in the order of its requests
TO/_counts/part-000012.json   how many of its requests were scored: written before the part
TO/_SUCCESS                   written last: the sums of these
```
"""

import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, Literal

import pyarrow as pa

from ctrsink import kept, storage, strict_json
from ctrsink.dataset.arrow import to_parquet
from ctrsink.errors import InputError

Form = Literal["parquet", "jsonl"]
SETTINGS, SUCCESS, COUNTS = "_scores.json", "_SUCCESS", "_counts"


@dataclass(frozen=True)
class Counts:
    """How the requests of a part, or of all, ended."""

    requests: int = 0
    candidates: int = 0
    skipped: int = 0
    first: str | None = None
    """What the first of the skipped ones is told."""

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            self.requests + other.requests,
            self.candidates + other.candidates,
            self.skipped + other.skipped,
            other.first if self.first is None else self.first,
        )


@dataclass(frozen=True)
class Parts:
    """The parts in the folder `to`."""

    to: str
    form: Form

    def done(self) -> set[int]:
        """Blocks whose part is there."""
        names = (name.removeprefix("part-").partition(".") for name in storage.list_files(self.to) if name.startswith("part-"))
        return {int(number) for number, _, ending in names if ending == self.form}

    def write(self, number: int, content: bytes, counts: Counts) -> None:
        """Put the part of a block whole; one that is there already is replaced by the same."""
        storage.write_bytes(self._counts(number), strict_json.dumps(asdict(counts)).encode())
        storage.write_bytes(storage.join(self.to, f"{_name(number)}.{self.form}"), content)

    def counts(self, number: int) -> Counts:
        """Those of a block whose part is there.

        Raises:
            InputError: they are gone or damaged.
        """
        try:
            return Counts(**json.loads(storage.read_bytes(self._counts(number))))
        except (FileNotFoundError, ValueError, TypeError):
            raise InputError(
                f"{self._counts(number)} is missing or damaged: delete {_name(number)}, it is scored again"
            ) from None

    def claim(self, settings: dict[str, Any]) -> bool:
        """Make the folder that of scores by these `settings`; returns whether it is new.

        Raises:
            InputError: it holds something else, or scores by other settings.
        """
        path = storage.join(self.to, SETTINGS)
        stamped = strict_json.dumps(kept.stamped(settings), indent=1).encode()
        if not storage.exists(path):
            # Counts without a part are what a write that failed leaves.
            if storage.exists(self.to) and (storage.list_files(self.to) or set(storage.list_dirs(self.to)) - {COUNTS}):
                raise InputError(f"{self.to} holds something else than scores: choose another folder")
            if storage.create(path, stamped):
                return True
        try:
            before = kept.opened(json.loads(storage.read_bytes(path)), path)
        except ValueError:
            raise InputError(f"{path} is damaged: delete {self.to}, or choose another folder") from None
        for key, value in json.loads(strict_json.dumps(settings)).items():
            if before.get(key) != value:
                raise InputError(f"{self.to} holds scores of {_difference(key, before.get(key), value)}: choose another folder")
        return False

    def forget(self) -> None:
        """Take back a claim under which nothing was scored."""
        for name in (COUNTS, SETTINGS):
            storage.delete(storage.join(self.to, name))
        if not storage.is_remote(self.to):
            with suppress(OSError):  # there is something else in it
                storage.local_path(self.to).rmdir()

    def succeed(self, counts: Counts) -> None:
        """Say that all parts are there."""
        storage.write_bytes(storage.join(self.to, SUCCESS), strict_json.dumps(asdict(counts)).encode())

    def _counts(self, number: int) -> str:
        return storage.join(self.to, COUNTS, f"{_name(number)}.json")


def as_parquet(rows: list[dict[str, Any]], ids: pa.DataType) -> bytes:
    """Columns id, probabilities and error; what is no text is as an id of text as JSON writes it."""
    plain = _text if pa.types.is_string(ids) else lambda value: value
    names = [plain(row.get("id")) for row in rows]
    columns = {
        "id": pa.array(names, ids),
        "probabilities": pa.array([row.get("probabilities") for row in rows], pa.list_(pa.float64())),
        "error": pa.array([row.get("error") for row in rows], pa.string()),
    }
    return to_parquet(pa.table(columns))


def _text(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else strict_json.dumps(value)


def _name(number: int) -> str:
    return f"part-{number:06d}"


def _difference(key: str, before: Any, now: Any) -> str:
    """Such as `another input (a.jsonl has changed)`."""
    if key in ("input", "model") and isinstance(before, list):
        names = {row[0]: row for row in before}
        for row in now:
            if row != names.pop(row[0], None):
                return f"another {key} ({row[0]} is new or has changed)"
        return f"another {key} ({next(iter(names), 'the order of files')} is gone)"
    return f"{key} {before}, not {now}"
