"""Files of events by user: the same bytes merged or not, and requests that grow with the bytes, counted and foretold."""

import itertools
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctrsink import storage
from ctrsink.dataset import splits
from ctrsink.prepare import pile as piles
from ctrsink.prepare.assemble import Assembly
from ctrsink.prepare.build import append, prepare
from ctrsink.prepare.execute import in_process
from ctrsink.prepare.pile import SMALL_BYTES, Pile, Shape, plan, slices
from tests.prepared_in_tasks import ROWS, Counting, Interrupted, contents, spec_of, write_log

MANY: dict[str, Any] = {"block_bytes": 400, "shard_events": 10}
"""Some ten blocks, and twenty shards."""
LOG, MORE = ROWS[:150], ROWS[150:220]


def made(folder: Path, to: str) -> dict[str, bytes]:
    """A log prepared with some of it twice, which is dropped, and more appended."""
    log, more = write_log(folder / "a.csv", [*LOG, *LOG[:40]]), write_log(folder / "b.csv", MORE)
    prepare(spec_of(log, duplicates="drop", **MANY), str(folder / to))
    append(spec_of(more, duplicates="drop", **MANY), str(folder / to))
    return contents(folder / to)


def twice(shape: Shape, total_bytes: int, shards: int) -> tuple[Shape, ...]:
    """Merging two times, whatever it costs."""
    return shape.merged(shards), shape.merged(shards).merged(shards)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What comes of it where nothing is merged."""
    with patch.object(piles, "plan", lambda *of: ()):
        return made(tmp_path_factory.mktemp("plain"), "data")


@pytest.mark.parametrize("fan", [2, 4])
def test_merging_changes_no_byte(fan: int, plain: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(piles, "FAN", fan)
    monkeypatch.setattr(piles, "plan", twice)
    assert made(tmp_path, "data") == plain


def test_an_interrupted_merging_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(piles, "FAN", 4)
    monkeypatch.setattr(piles, "plan", twice)
    spec, every, rest = spec_of(write_log(tmp_path / "log.csv", LOG), **MANY), Counting(), Counting()
    prepare(spec, str(tmp_path / "once"), execute=every)
    limit = -(-(tmp_path / "log.csv").stat().st_size // 400) + 3  # all blocks, and some merged files
    with pytest.raises(KeyboardInterrupt):
        prepare(spec, str(tmp_path / "data"), execute=Interrupted(limit))
    assert [path.name[:9] for path in (tmp_path / "data" / "_work").iterdir() if path.is_dir()].count("merged-1-") == 1
    prepare(spec, str(tmp_path / "data"), execute=rest)
    assert every.done - limit - 1 <= rest.done <= every.done - limit
    assert contents(tmp_path / "data") == contents(tmp_path / "once")


def test_the_requests_of_shards_are_those_foretold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted at the storage, against the spans, by kind of file."""
    monkeypatch.setattr(piles, "FAN", 4)
    monkeypatch.setattr(piles, "plan", twice)
    counted: Counter[str] = Counter()
    read_range, foretold = storage.read_range, Counter[str]()

    def counting(uri: str, start: int, end: int) -> bytes:
        counted[uri.split("/")[-2].rpartition("-")[0]] += 1
        return read_range(uri, start, end)

    def execute(task: object, numbers: list[int]):
        if isinstance(task, piles.Merge):
            width = splits.PREFIXES // task.shape.ranges
            name = task.source.folder.rpartition("/")[2].rpartition("-")[0]
            foretold[name] += sum(1 for at in range(task.shape.ranges) for _ in task.source.spans(at * width, (at + 1) * width))
            assert foretold[name] <= task.source.groups * task.shape.ranges
        elif isinstance(task, Assembly):
            name = task.pile.folder.rpartition("/")[2].rpartition("-")[0]
            foretold[name] += sum(1 for cut in task.ranges for _ in task.pile.spans(*cut))
            assert foretold[name] <= Shape(task.pile.groups, task.pile.ranges, task.pile.slices).reads(len(task.ranges))
        return in_process(task, numbers)  # pyright: ignore[reportArgumentType]

    log = write_log(tmp_path / "log.csv", LOG)
    with monkeypatch.context() as patched:
        patched.setattr(storage, "read_range", counting)
        prepare(spec_of(log, **MANY), str(tmp_path / "data"), execute=execute)  # pyright: ignore[reportArgumentType]
    del counted[str(log).split("/")[-2].rpartition("-")[0]]  # the blocks of the log itself
    assert counted == foretold
    assert "merged-2" in counted


def dense(shape: Shape, bytes_of_slice: int) -> Pile:
    """A pile without an empty slice."""
    ends = np.arange(1, shape.slices + 1) * bytes_of_slice
    return Pile("nowhere", None, shape.groups, shape.ranges, shape.slices, (ends,) * (shape.groups * shape.ranges))


@given(st.integers(1, 5), st.integers(0, 4), st.integers(0, 4), st.sets(st.integers(1, splits.PREFIXES - 1), max_size=20))
def test_a_shard_asks_one_file_of_a_group_and_one_for_each_edge_in_it(groups: int, ranges: int, cut: int, cuts: set[int]) -> None:
    shape = Shape(groups, 2**ranges, 2**cut)
    edges = [0, *sorted(cuts), splits.PREFIXES]
    shards = list(itertools.pairwise(edges))
    inside = [edge for edge in range(0, splits.PREFIXES, splits.PREFIXES // shape.ranges) if edge not in edges]
    spans = [span for shard in shards for span in dense(shape, 10).spans(*shard)]
    assert len(spans) == groups * (len(shards) + len(inside)) <= shape.reads(len(shards))
    assert sum(span.end - span.start for span in spans) >= 10 * groups * shape.ranges * shape.slices


@given(st.integers(1, 10**13), st.integers(1, 2**26), st.integers(1_000, 10**8))
def test_requests_grow_with_the_bytes(log_bytes: int, block_bytes: int, shard_bytes: int) -> None:
    """Whatever the log: no more than by asking every block, and at most one for SMALL_BYTES unless merging would add to them."""
    blocks, shards = -(-log_bytes // block_bytes), -(-log_bytes // shard_bytes)
    shape = Shape(blocks, 1, slices(shards))
    steps = plan(shape, log_bytes, shards)
    last = steps[-1] if steps else shape
    merging = sum(before.merging() for before in (shape, *steps)[: len(steps)])
    assert merging + last.reads(shards) <= shape.reads(shards)
    assert all(step.ranges * step.slices <= splits.PREFIXES for step in steps)
    assert last.reads(shards) * SMALL_BYTES <= log_bytes or last.merging() + last.merged(shards).reads(shards) >= last.reads(
        shards
    )


def test_a_billion_events() -> None:
    """950 blocks of 32 MiB and 4,000 shards: one merging, 125 thousand requests instead of 3.8 million."""
    blocks, shards = 950, 4_000
    shape = Shape(blocks, 1, slices(shards))
    (after,) = plan(shape, 20 * 10**9, shards)
    assert after == Shape(15, 64, 128)
    assert shape.reads(shards) == 3_800_000
    assert shape.merging() + after.reads(shards) == 950 * 64 + 3 * 15 * 64 + 15 * 4_063 < 130_000
    ten = plan(Shape(10 * blocks, 1, slices(10 * shards)), 200 * 10**9, 10 * shards)
    assert len(ten) == 2
