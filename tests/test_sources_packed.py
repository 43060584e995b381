"""Packed files, of several members too, and files that hold nothing among others."""

import gzip
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ctrsink.config.data import ColumnSpec, SourceSpec
from ctrsink.errors import InputError
from ctrsink.prepare.sources import open_source
from ctrsink.prepare.sources.files import HEAD, read_head
from tests.whole_log import read_source

LINES = [b'{"user": "u", "item": "a", "timestamp": 1}\n', b'{"user": "v", "item": "b", "timestamp": 2, "click": 1}\n']
ROWS = [b"user,item,timestamp\n", b"u,a,1\n", b"v,b,2\n"]


def table(path: Path, label: str | None = None) -> SourceSpec:
    return SourceSpec(kind="table", path=str(path), columns=ColumnSpec(label=label))


def members(*contents: bytes) -> bytes:
    return b"".join(gzip.compress(content) for content in contents)


def test_columns_may_be_in_a_later_member(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl.gz").write_bytes(members(*LINES))
    assert read_source(table(tmp_path / "log.jsonl.gz", "click")).events["label"].to_pylist() == [None, 1]


def test_members_may_be_cut_anywhere(tmp_path: Path) -> None:
    content = b"".join(ROWS)
    for cut in range(len(content) + 1):
        (tmp_path / "log.csv.gz").write_bytes(members(content[:cut], b"", content[cut:]))
        assert read_source(table(tmp_path / "log.csv.gz")).events["user"].to_pylist() == ["u", "v"]


def test_the_head_of_a_large_file_reaches_over_members(tmp_path: Path) -> None:
    lines = LINES[0] * 100 + LINES[1] * (2 * HEAD // len(LINES[1]))
    (tmp_path / "log.jsonl.gz").write_bytes(members(lines[: 50 * len(LINES[0])], lines[50 * len(LINES[0]) :]))
    assert read_head(str(tmp_path / "log.jsonl.gz")) == lines[:HEAD]
    noise = gzip.compress(lines, 0)  # its head ends within a member
    (tmp_path / "log.jsonl.gz").write_bytes(noise)
    assert lines.startswith(head := read_head(str(tmp_path / "log.jsonl.gz")))
    assert len(head) > HEAD - 2**16


@pytest.mark.parametrize("damage", [lambda packed: packed[:-9], lambda packed: packed + b"more", lambda packed: packed[:4]])
def test_a_damaged_member_is_told(tmp_path: Path, damage) -> None:
    (tmp_path / "log.csv.gz").write_bytes(damage(members(*ROWS)))
    with pytest.raises(InputError, match=r"log\.csv\.gz is not a whole gzip file"):
        read_source(table(tmp_path / "log.csv.gz"))


NOTHING = {"nothing": members(b""), "many": members(b"", b"", b""), "blanks": members(b"\n", b" \n")}


@pytest.mark.parametrize("nothing", NOTHING)
@pytest.mark.parametrize(("ending", "content"), [("csv", b"".join(ROWS)), ("jsonl", b"".join(LINES))])
def test_a_packed_file_that_holds_nothing_is_left_out_of_a_folder(
    tmp_path: Path, nothing: str, ending: str, content: bytes
) -> None:
    (tmp_path / f"a.{ending}.gz").write_bytes(NOTHING[nothing])
    (tmp_path / f"b.{ending}.gz").write_bytes(members(content))
    (tmp_path / f"c.{ending}").write_bytes(b"\n\n")
    (tmp_path / f"d.{ending}").write_bytes(content)
    assert read_source(table(tmp_path)).events["user"].to_pylist() == ["u", "v"] * 2
    for name in ("b", "d"):
        for path in tmp_path.glob(f"{name}.*"):
            path.unlink()
    with pytest.raises(InputError, match=f"the event log {tmp_path} holds no event"):
        read_source(table(tmp_path))
    with pytest.raises(InputError, match=rf"a\.{ending}\.gz is empty"):
        read_source(table(tmp_path / f"a.{ending}.gz"))


def test_a_file_that_begins_with_a_mebibyte_of_blanks_is_not_left_out(tmp_path: Path) -> None:
    for name, pack in (("a.csv", bytes), ("a.csv.gz", gzip.compress)):
        (tmp_path / name).write_bytes(pack(b"\n" * HEAD + b"".join(ROWS)))
        (tmp_path / "b.csv").write_bytes(b"".join(ROWS))
        with pytest.raises(InputError, match=r"a\.csv.* begins with 1 MiB of blanks: remove them"):
            read_source(table(tmp_path))
        (tmp_path / name).unlink()


def test_an_item_table_may_have_files_without_rows(tmp_path: Path) -> None:
    for ending, empty, full in (
        ("csv.gz", members(b"item,title\n"), members(b"item,title\na,A\n")),
        ("jsonl.gz", members(b""), members(b'{"item": "a", "title": "A"}\n')),
    ):
        folder = tmp_path / ending
        folder.mkdir()
        (folder / f"1.{ending}").write_bytes(empty)
        source = open_source(SourceSpec(kind="table", path="nowhere", items=str(folder)))
        with pytest.raises(InputError, match=r"is empty"):
            source.items()
        (folder / f"2.{ending}").write_bytes(full)
        items = source.items()
        assert items is not None
        assert items.to_pylist() == [{"item": "a", "title": "A"}]
        (folder / f"2.{ending}").write_bytes(empty)
        with pytest.raises(InputError, match=f"the item table {folder} is empty"):
            source.items()
    folder = tmp_path / "parquet"
    folder.mkdir()
    rows = pa.table({"item": ["a"], "title": ["A"]})
    pq.write_table(rows.slice(1), folder / "1.parquet")
    pq.write_table(rows, folder / "2.parquet")
    items = open_source(SourceSpec(kind="table", path="nowhere", items=str(folder))).items()
    assert items is not None
    assert items.to_pylist() == rows.to_pylist()
