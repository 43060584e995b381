"""What the tests of preparation as tasks share: a log in order of time, its preparation, and ways to run the tasks."""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ctrsink.config.data import ColumnSpec, PrepareSpec, SourceSpec, SplitSpec, TextSpec, TokenizerSpec
from ctrsink.prepare.execute import Task, in_process
from tests.builders import make_log

ROWS = sorted(make_log(0, 60), key=lambda row: row["timestamp"])
HALF = len(ROWS) // 2
COLUMNS = ("user", "item", "timestamp", "stars")


def write_log(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    return path


def spec_of(path: Path | str, items: Path | None = None, **more: Any) -> PrepareSpec:
    """About ten shards; without an item table, so that items are found while the log is read."""
    source = SourceSpec(kind="table", path=str(path), items=items and str(items), columns=ColumnSpec(feedback="stars"))
    fields: dict[str, Any] = {"shard_events": 50, "split": SplitSpec(train=0.6, valid=0.2)} | more
    return PrepareSpec(source=source, text=TextSpec(item="item {item}"), tokenizer=TokenizerSpec(train_vocabulary=300), **fields)


def contents(folder: Path | str) -> dict[str, bytes]:
    """Every file of a data set."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


class Interrupted:
    """Runs tasks here until `limit` of them are done, then as if the machine went down."""

    def __init__(self, limit: int) -> None:
        self.limit, self.done = limit, 0

    def __call__(self, task: Task, numbers: Sequence[int]) -> Iterator[int]:
        for number in in_process(task, numbers):
            if self.done == self.limit:
                raise KeyboardInterrupt
            self.done += 1
            yield number


class Counting:
    """Runs tasks here and counts them."""

    def __init__(self) -> None:
        self.done = 0

    def __call__(self, task: Task, numbers: Sequence[int]) -> Iterator[int]:
        self.done += len(numbers)
        return in_process(task, numbers)
