"""However a log is cut into blocks, the same is read; and the layouts of public data sets, with their quirks."""

import csv
import gzip
import io
import json
import pickle
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ctrsink.config.data import ColumnSpec, SourceSpec
from ctrsink.errors import InputError
from ctrsink.prepare.check_rows import RawRows
from ctrsink.prepare.sources import RawLog, open_source

BIG = 1 << 30
BLOCKS = st.integers(1, 60)


def read_blocks(source: RawLog, block_bytes: int) -> list[RawRows]:
    """Every block as another machine would read it."""
    there, blocks = pickle.loads(pickle.dumps((source, source.blocks(block_bytes))))  # noqa: S301
    return [there.read(block) for block in blocks]


def rows_in(raw: RawRows) -> int:
    return max([0, *raw.numbers.tolist(), *(number for number, _ in raw.broken)])


def whole(parts: list[RawRows]) -> tuple[list[dict[str, object]], list[int], list[tuple[int, str]]]:
    """The rows of all blocks of a file, their numbers in the file, and the broken rows."""
    table: list[dict[str, object]] = []
    numbers: list[int] = []
    broken: list[tuple[int, str]] = []
    rows = 0
    for raw in parts:
        table += raw.table.to_pylist()
        numbers += (raw.numbers + rows).tolist()
        broken += [(number + rows, why) for number, why in raw.broken]
        rows += rows_in(raw)
    return table, numbers, broken


def log_of(path: Path, content: bytes, **columns: str) -> RawLog:
    path.write_bytes(content)
    return open_source(SourceSpec(kind="table", path=str(path), columns=ColumnSpec(**columns)))


def outcome(source: RawLog, block_bytes: int) -> object:
    """What is read, or why it cannot be."""
    try:
        found = whole(read_blocks(source, block_bytes))
    except InputError as error:
        return next(why for why in ("never closed", "holds no event") if why in str(error))
    return found if found[0] or found[2] else "holds no event"


# --- csv ---

cell = st.text(st.sampled_from('ab,"\n\r é'), max_size=6)
quoted = cell.map(lambda text: '"' + text.replace('"', '""') + '"')
plain = st.text(st.sampled_from('ab"é '), max_size=5).filter(lambda text: not text.startswith('"'))
line = st.lists(st.one_of(plain, quoted), min_size=1, max_size=4).map(",".join)
ends = st.sampled_from(["\n", "\r\n", "\n\n", "\r\n\r\n"])


@st.composite
def csv_text(draw: st.DrawFn) -> bytes:
    """Rows of three cells and broken ones: line breaks in quotes, quotes within cells, empty lines, CR LF, a byte order mark."""
    before = draw(st.sampled_from(["", "\ufeff", "\n", "\ufeff\r\n"]))
    header = draw(st.sampled_from(["user,item,timestamp", '"user","item",timestamp'])) + draw(ends)
    body = "".join(draw(line) + draw(st.one_of(ends, st.just("\r"))) for _ in range(draw(st.integers(0, 12))))
    return (before + header + body + draw(st.one_of(st.just(""), line))).encode()


@settings(max_examples=400)
@given(content=csv_text(), block_bytes=BLOCKS)
@example(content=b'user,item,timestamp\n"a\n\n""b",5" disc,"x"y"\nc,d,"\n"\n', block_bytes=1)
@example(content=b'user,item,timestamp\na,"b,c\nd,e,f\n', block_bytes=3)
def test_csv_is_read_the_same_however_it_is_cut(content: bytes, block_bytes: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        source = log_of(Path(folder) / "log.csv", content)
        assert outcome(source, block_bytes) == outcome(source, BIG)
        packed = log_of(Path(folder) / "log.csv.gz", gzip.compress(content))
        assert outcome(packed, block_bytes) == outcome(source, BIG)


def test_csv_blocks_are_of_the_wanted_size_and_end_with_rows(tmp_path: Path) -> None:
    rows = [(f"user{i}", f'a "quoted"\nname, {i}', i) for i in range(5_000)]
    text = io.StringIO(newline="")
    csv.writer(text).writerows([("user", "item", "timestamp"), *rows])
    source = log_of(tmp_path / "log.csv", text.getvalue().encode())
    blocks = source.blocks(10_000)
    assert len(blocks) == len(text.getvalue()) // 10_000 + 1
    assert {10_000 <= block.end - block.start < 10_100 for block in blocks[:-1]} == {True}
    found = whole([source.read(block) for block in blocks])[0]
    assert [(row["user"], row["item"], row["timestamp"]) for row in found] == [(u, i, str(t)) for u, i, t in rows]


def test_a_line_break_far_inside_a_cell_is_no_place_to_cut(tmp_path: Path) -> None:
    long = "text\n" * 50_000  # longer than what is read at once in search of the row's end
    source = log_of(tmp_path / "log.csv", f'user,item,timestamp\nu,"{long}",1\nu,b,2\n'.encode())
    assert [len(raw.table) for raw in read_blocks(source, 100)] == [1, 1]


def test_a_quote_that_is_never_closed_is_named(tmp_path: Path) -> None:
    source = log_of(tmp_path / "log.csv", b'user,item,timestamp\nu,"tea, 1\nu,b,2\n' + b"u,c,3\n" * 100)
    for block_bytes in (1, 20, BIG):
        with pytest.raises(InputError, match=r"log.csv: a quote is never closed, that before 'tea, 1 u,b,2"):
            read_blocks(source, block_bytes)


def test_lines_are_numbered_behind_the_header_of_the_file(tmp_path: Path) -> None:
    source = log_of(tmp_path / "log.csv", b"user,item,timestamp\nu,a,1\nu,b\nu,c,3\n")
    parts = read_blocks(source, 1)
    assert [raw.header_lines for raw in parts] == [1, 1, 1]
    assert whole(parts)[1:] == ([1, 3], [(2, "2 columns instead of 3")])


# --- jsonl ---

value = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4), st.lists(st.integers(), max_size=3))
record = st.fixed_dictionaries({}, optional=dict.fromkeys(("user", "item", "timestamp", "note"), value)).map(json.dumps)
FIRST = json.dumps({"user": "u", "item": 7, "timestamp": 1.5, "click": True})


@settings(max_examples=200)
@given(
    lines=st.lists(st.one_of(record, st.sampled_from(["", "  ", "[1]", '{"user":', "null", '{"user": "é\\n"}'])), max_size=12),
    end=st.sampled_from(["\n", "\r\n"]),
    block_bytes=BLOCKS,
)
def test_jsonl_is_read_the_same_however_it_is_cut(lines: list[str], end: str, block_bytes: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        content = end.join([FIRST, *lines]).encode()
        source = log_of(Path(folder) / "log.jsonl", content, feedback="click")
        assert outcome(source, block_bytes) == outcome(source, BIG)
        packed = log_of(Path(folder) / "log.jsonl.gz", gzip.compress(content), feedback="click")
        assert outcome(packed, block_bytes) == outcome(source, BIG)


def test_jsonl_values_are_text_of_one_form(tmp_path: Path) -> None:
    lines = [
        FIRST,
        '{"user": 12345678901234567890, "item": "é", "timestamp": 1e3, "click": false}',
        '{"user": null, "click": NaN}',
    ]
    source = log_of(tmp_path / "log.jsonl", "\n".join(lines).encode(), feedback="click")
    assert [tuple(row.values()) for row in whole(read_blocks(source, 1))[0]] == [
        ("u", "7", "1.5", "1"),
        ("12345678901234567890", "é", "1000", "0"),
        (None, None, None, None),
    ]


# --- parquet ---


def test_parquet_is_cut_between_row_groups_and_only_the_mapped_columns_are_read(tmp_path: Path) -> None:
    table = pa.table(
        {
            "user": pa.array([f"u{n % 3}" for n in range(100)]).dictionary_encode(),
            "item": list(range(100)),
            "timestamp": pa.array(range(100), pa.timestamp("s")),
            "text": ["x" * 500] * 100,
        }
    )
    pq.write_table(table, tmp_path / "log.parquet", row_group_size=7)
    source = open_source(SourceSpec(kind="table", path=str(tmp_path / "log.parquet")))
    all_at_once = whole(read_blocks(source, BIG))
    assert [tuple(row) for row in all_at_once[0]] == [("user", "item", "timestamp")] * 100
    sizes = [len(read_blocks(source, block_bytes)) for block_bytes in (1, 2_000, BIG)]
    assert sizes[0] == 15 > sizes[1] > sizes[2] == 1
    assert whole(read_blocks(source, 1)) == whole(read_blocks(source, 2_000)) == all_at_once


def test_parquet_on_s3_is_read_by_ranges(tmp_path: Path, s3_server) -> None:
    from ctrsink import storage

    table = pa.table({"user": ["a", "b"], "item": ["x", "y"], "timestamp": [1, 2]})
    pq.write_table(table, tmp_path / "log.parquet", row_group_size=1)
    uri = "s3://ctrsink-test/blocks/day=1/part-0.parquet"
    storage.write_bytes(uri, (tmp_path / "log.parquet").read_bytes())
    storage.write_bytes("s3://ctrsink-test/blocks/_SUCCESS", b"")
    source = open_source(SourceSpec(kind="table", path="s3://ctrsink-test/blocks"))
    parts = read_blocks(source, 1)
    assert [(raw.file, raw.table.to_pylist()) for raw in parts] == [(uri, [row]) for row in table.to_pylist()]


# --- folders ---


def test_a_folder_is_read_file_by_file(tmp_path: Path) -> None:
    for name, content in {
        "b/part-1.csv": "timestamp,item,user,more\n3,z,w,?\n",
        "a/part-2.csv": "user,item,timestamp\nu,x,1\nv,y,2\n",
        "a/part-3.csv": "user,item,timestamp\n",
        "a/empty.csv": "",
        "_SUCCESS": "done",
        "_old/part-1.csv": "user\n",
        ".part-1.csv.crc": "?",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    source = open_source(SourceSpec(kind="table", path=str(tmp_path)))
    found = [(Path(raw.file).name, *row.values()) for raw in read_blocks(source, 1) for row in raw.table.to_pylist()]
    assert found == [("part-2.csv", "u", "x", "1"), ("part-2.csv", "v", "y", "2"), ("part-1.csv", "w", "z", "3")]
    (tmp_path / "b" / "more.jsonl").write_text("{}")
    with pytest.raises(InputError, match=r"holds files of several kinds \(.*more.jsonl, .*part-1.csv\)"):
        source.blocks(1)


def test_items_may_be_a_folder(tmp_path: Path) -> None:
    (tmp_path / "items").mkdir()
    (tmp_path / "items" / "1.jsonl").write_text('{"item": 1, "title": "One", "tags": ["a", "b"]}\n')
    (tmp_path / "items" / "2.jsonl").write_text('{"item": 2, "title": "Two"}\n')
    source = open_source(SourceSpec(kind="table", path="nowhere", items=str(tmp_path / "items")))
    items = source.items()
    assert items is not None
    assert items.to_pylist() == [{"item": "1", "title": "One", "tags": "a b"}, {"item": "2", "title": "Two", "tags": ""}]
    (tmp_path / "items" / "3.jsonl").write_text('{"item": 1, "title": "Uno"}\n')
    with pytest.raises(InputError, match="item '1' is in more than one file"):
        source.items()


@pytest.mark.parametrize("place", ["nothing", "empty", "hidden"])
def test_a_folder_without_a_table_is_named(tmp_path: Path, place: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "_SUCCESS").touch()
    with pytest.raises(InputError, match=f"{place} (does not exist|is empty)"):
        open_source(SourceSpec(kind="table", path=str(tmp_path / place))).blocks(1)


def test_a_log_that_shrinks_is_refused(tmp_path: Path) -> None:
    source = log_of(tmp_path / "log.csv", b"user,item,timestamp\n" + b"u,a,1\n" * 9)
    block = source.blocks(20)[-1]
    (tmp_path / "log.csv").write_bytes(b"user,item,timestamp\nu,a,1\n")
    with pytest.raises(InputError, match=r"log.csv became shorter while it was read"):
        source.read(block)


def test_a_column_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    source = log_of(tmp_path / "log.csv", b"user,item,item,timestamp\nu,a,b,1\n")
    with pytest.raises(InputError, match="has more than one column 'item'; it has user, item, item, timestamp"):
        source.blocks(1)


def test_items_and_columns_are_for_tables_only() -> None:
    for keys in ({"items": "items.csv"}, {"columns": {"user": "who"}}, {"items_columns": {"title": "name"}}):
        with pytest.raises(
            ValueError, match="items, columns and items_columns belong to kind table, the source mind has its own"
        ):
            SourceSpec.model_validate({"kind": "mind", "path": "raw", **keys})
