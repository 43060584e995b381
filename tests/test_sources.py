"""Every layout of a log gives the same events, and every row that cannot be used is named."""

import gzip
import hashlib
import io
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ctrsink.cli import main
from ctrsink.config.data import ColumnSpec, SourceSpec
from ctrsink.errors import InputError
from ctrsink.prepare.download import ARCHIVES, Archive, download
from ctrsink.prepare.sources import open_source
from tests.data_fixtures import (
    MOVIES,
    Event,
    make_events,
    table_source,
    write_1m,
    write_published_100k,
    write_recbole_100k,
    write_table,
)
from tests.whole_log import read_source

EVENTS = make_events()


@pytest.mark.parametrize("write", [write_published_100k, write_recbole_100k, write_1m])
def test_movielens_layouts_give_the_same_log(tmp_path: Path, write) -> None:
    found = read_source(SourceSpec(path=str(write(tmp_path / "ml", EVENTS))))
    columns = [found.events.column(name).to_pylist() for name in ("user", "item", "feedback", "timestamp")]
    assert list(zip(*columns, strict=True)) == [(str(u), str(i), float(r), t) for u, i, r, t in EVENTS]
    assert found.items.to_pylist() == [
        {"item": str(m.id), "title": m.title, "year": m.year, "genres": " ".join(m.genres).lower()} for m in MOVIES
    ]


def test_movielens_needs_a_known_layout(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no MovieLens log \(u.data, ml-100k.inter, ratings.dat, ratings.csv\)"):
        read_source(SourceSpec(path=str(tmp_path)))


def test_movielens_names_the_bad_row(tmp_path: Path) -> None:
    write_1m(tmp_path, EVENTS)
    with (tmp_path / "ratings.dat").open("a") as file:
        file.write("3::1::five::1000000000\n")
    spec = SourceSpec(path=str(tmp_path))
    with pytest.raises(InputError, match=rf"ratings.dat, row {len(EVENTS) + 1} .*column rating: 'five' is not a number"):
        read_source(spec)
    skipping = read_source(spec, "skip")
    assert (skipping.events.num_rows, skipping.skipped_rows) == (len(EVENTS), 1)


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_table_formats_give_the_same_log(tmp_path: Path, ending: str) -> None:
    expected = read_source(table_source(tmp_path, EVENTS, "csv"))
    found = read_source(table_source(tmp_path, EVENTS, ending))
    assert found.events.equals(expected.events)
    assert found.items.equals(expected.items)
    assert expected.events.column("feedback").null_count == sum(n % 7 == 3 for n in range(len(EVENTS)))


def test_table_from_s3_and_packed(tmp_path: Path, s3_server) -> None:
    from ctrsink import storage

    spec = table_source(tmp_path, EVENTS)
    packed = "s3://ctrsink-test/sources/log.csv.gz"
    storage.write_bytes(packed, gzip.compress(Path(spec.path).read_bytes()))
    assert read_source(spec.model_copy(update={"path": packed})).events.equals(read_source(spec).events)


def test_a_log_without_an_item_table_has_no_items(tmp_path: Path) -> None:
    spec = table_source(tmp_path, EVENTS).model_copy(update={"items": None})
    assert open_source(spec).items() is None
    assert read_source(spec).events.num_rows == len(EVENTS)


def test_parquet_times_and_typed_ids(tmp_path: Path) -> None:
    table = pa.table(
        {
            "user": pa.array([7, 7], pa.int64()),
            "item": pa.array(["a", "b"]).dictionary_encode(),
            "timestamp": pa.array([1_500, 2_999], pa.timestamp("ms", tz="UTC")),
            "click": pa.array([True, False]),
        }
    )
    pq.write_table(table, tmp_path / "log.parquet")
    columns = ColumnSpec(label="click")
    found = read_source(SourceSpec(kind="table", path=str(tmp_path / "log.parquet"), columns=columns)).events
    assert found.column("user").to_pylist() == ["7", "7"]
    assert found.column("timestamp").to_pylist() == [1, 2]
    assert found.column("label").to_pylist() == [1, 0]


GOOD = {"user": "u", "item": "a", "timestamp": 100, "label": 1, "rating": 2.5}
BAD = [
    ({"timestamp": None}, "column timestamp: the timestamp is missing"),
    ({"timestamp": "yesterday"}, "column timestamp: 'yesterday' is not a number"),
    ({"timestamp": 1_600_000_000_000}, "column timestamp: .*is it in milliseconds"),
    ({"user": None}, "column user: a value is missing"),
    ({"item": None}, "column item: a value is missing"),
    ({"item": "z"}, "column item: 'z' is not in the item table"),
    ({"label": 2}, "column label: '?2'? is no label, it must be 0, 1 or empty"),
    ({"label": "yes"}, "column label: 'yes' is not a number"),
    ({"rating": "good"}, "column rating: 'good' is not a number"),
    ({"rating": "-1e39"}, "column rating: .*-1e39.* is no feedback, it lies beyond float32|column rating: .*-1e.39.* float32"),
    ({"rating": "1e999"}, "column rating: .*1e999' is not a finite number|column rating: .*inf"),
]


def bad_table(folder: Path, ending: str, changes: dict[str, object]) -> SourceSpec:
    """Three good rows and, third, one with `changes`."""
    rows = [GOOD, GOOD, {**GOOD, **changes}, GOOD]
    if ending == "parquet" and any(isinstance(v, str) for v in changes.values()):  # a typed column holds no text
        rows = [{k: v if v is None else str(v) for k, v in row.items()} for row in rows]
    log = write_table(folder / f"log.{ending}", rows)
    items = write_table(folder / "items.csv", [{"item": "a", "title": "A"}])
    columns = ColumnSpec(label="label", feedback="rating")
    return SourceSpec(kind="table", path=str(log), items=str(items), columns=columns)


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize(("changes", "message"), BAD)
def test_bad_cell_is_named_or_skipped(tmp_path: Path, ending: str, changes: dict[str, object], message: str) -> None:
    spec = bad_table(tmp_path, ending, changes)
    with pytest.raises(InputError, match=message) as caught:
        read_source(spec)
    assert f"log.{ending}, row 3" in str(caught.value)
    assert ("(line 4)" in str(caught.value)) == (ending == "csv")
    skipping = read_source(spec, "skip")
    assert (skipping.events.num_rows, skipping.skipped_rows) == (3, 1)


@pytest.mark.parametrize(
    ("name", "content", "message", "skipped"),
    [
        ("log.csv", "user,item,timestamp\nu,a,1\nu,a\nu,a,x\n", r"row 2 \(line 3\): 2 columns instead of 3", 2),
        ("log.csv", "user,item,timestamp\nu,a,1\nu,a,x\nu,a\n", r"row 2 \(line 3\), column timestamp: 'x'", 2),
        ("log.csv", 'user,item,timestamp\n"u\n1",a,1\nu,a,x\n', r"log.csv, row 2, column timestamp", 1),
        ("log.jsonl", '{"user":"u","item":"a","timestamp":1}\n{"user":\n', r"row 2 .*the line is not a JSON object", 1),
    ],
)
def test_broken_row_is_named_or_skipped(tmp_path: Path, name: str, content: str, message: str, skipped: int) -> None:
    (tmp_path / name).write_text(content)
    spec = SourceSpec(kind="table", path=str(tmp_path / name))
    with pytest.raises(InputError, match=message):
        read_source(spec)
    skipping = read_source(spec, "skip")
    assert (skipping.events.num_rows, skipping.skipped_rows) == (1, skipped)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("log.csv", None, "does not exist"),
        ("log.csv", "", "is empty"),
        ("log.csv", " \n\n", "is empty"),
        ("log.csv", "user,item,timestamp\n", "holds no event"),
        ("log.csv", "user,item,timestamp\nu,,1\n", "row 1"),
        ("log.csv", "user,item,time\nu,a,1\n", "has no column 'timestamp'; it has user, item, time"),
        ("log.jsonl", '{"user": "u"}\n', "has no column 'item'; it has user"),
        ("log.jsonl", "[1]\n", "line 1: the line is not a JSON object"),
        ("log.csv", b"user,item,timestamp\n\xff\xfe,a,1\n", "UTF8"),
        ("log.parquet", "no parquet", "is not a whole parquet file"),
        ("log.csv.gz", "no gzip", "is not a whole gzip file"),
        ("log.txt", "text", "a table is a .csv, .jsonl or .parquet file"),
    ],
)
def test_unusable_file_is_named(tmp_path: Path, name: str, content: str | bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(InputError, match=message) as caught:
        read_source(SourceSpec(kind="table", path=str(tmp_path / name)))
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_item_table_is_checked(tmp_path: Path) -> None:
    spec = bad_table(tmp_path, "csv", {})
    items = tmp_path / "items.csv"
    for content, message in (
        ("item,title\na,A\nb,B\na,C\n", r"row 1 \(line 2\), column item: 'a' appears more than once"),
        ("id,title\na,A\n", "has no column 'item'; it has id, title"),
        ("item,title\n,A\n", "column item: a value is missing"),
        ("item,title\n", "is empty"),
    ):
        items.write_text(content)
        with pytest.raises(InputError, match=message):
            read_source(spec)


def zip_archive(path: Path, events: list[Event], *, digest: str | None = None) -> Archive:
    """An archive in the publisher's layout, at a file:// address."""
    folder = write_1m(path.parent / "content", events)
    with zipfile.ZipFile(buffer := io.BytesIO(), "w") as packed:
        for name in ("ratings.dat", "movies.dat"):
            packed.write(folder / name, f"ml-1m/{name}")
    path.write_bytes(buffer.getvalue())
    digest = digest or hashlib.sha256(buffer.getvalue()).hexdigest()
    return Archive(path.as_uri(), "sha256", digest, ("ml-1m/ratings.dat", "ml-1m/movies.dat"))


def test_download_takes_the_first_source_that_is_whole(tmp_path: Path) -> None:
    missing = Archive((tmp_path / "none.zip").as_uri(), "sha256", "0", ("ml-1m/ratings.dat",))
    altered = zip_archive(tmp_path / "altered.zip", EVENTS, digest="0" * 64)
    whole = zip_archive(tmp_path / "whole.zip", EVENTS)
    folder = download("movielens-1m", tmp_path / "deep" / "ml", (missing, altered, whole))
    assert sorted(p.name for p in folder.iterdir()) == ["movies.dat", "ratings.dat"]
    assert read_source(SourceSpec(path=str(folder))).events.num_rows == len(EVENTS)
    Path(tmp_path / "whole.zip").unlink()
    assert download("movielens-1m", folder, (whole,)) == folder


def test_failed_download_names_what_was_tried_and_leaves_nothing(tmp_path: Path) -> None:
    missing = Archive((tmp_path / "none.zip").as_uri(), "sha256", "0", ("ml-1m/ratings.dat",))
    altered = zip_archive(tmp_path / "altered.zip", EVENTS, digest="0" * 64)
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match=r"none.zip: .*altered.zip: its sha256 is .* expected 0000"):
        download("movielens-1m", tmp_path / "out" / "ml", (missing, altered))
    assert list((tmp_path / "out").iterdir()) == []
    with pytest.raises(InputError, match="there are movielens-100k, movielens-1m"):
        download("movielens-2m", tmp_path / "out")
    with pytest.raises(InputError, match="holds something else"):
        download("movielens-1m", tmp_path, (missing,))


def test_an_archive_of_changing_content_is_checked_by_its_own_checksums(tmp_path: Path) -> None:
    whole = zip_archive(tmp_path / "whole.zip", EVENTS)
    damaged = bytearray((tmp_path / "whole.zip").read_bytes())
    damaged[damaged.index(b"::") + 2] ^= 1
    (tmp_path / "damaged.zip").write_bytes(damaged)
    sources = [Archive((tmp_path / name).as_uri(), "md5", None, whole.members) for name in ("damaged.zip", "whole.zip")]
    with pytest.raises(InputError, match=r"damaged.zip: Bad CRC-32 for file 'ml-1m/"):
        download("movielens-latest-small", tmp_path / "ml", (sources[0],))
    assert not (tmp_path / "ml").exists()
    download("movielens-latest-small", tmp_path / "ml", (sources[1],))
    assert read_source(SourceSpec(path=str(tmp_path / "ml"))).events.num_rows == len(EVENTS)


def test_members_of_the_same_names_are_told_apart_by_their_readme(tmp_path: Path) -> None:
    for name in ("ratings.csv", "movies.csv"):
        (tmp_path / name).touch()
    (tmp_path / "README.txt").write_text("Summary\n=======\n\nThis dataset (ml-25m) describes 5-star ratings\n")
    assert download("movielens-25m", tmp_path) == tmp_path
    with pytest.raises(InputError, match="holds something else than movielens-20m"):
        download("movielens-20m", tmp_path)


def test_every_data_set_that_can_be_got_is_offered_and_pinned(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["data", "get", "--help"])
    offered = capsys.readouterr().out
    for name, archives in ARCHIVES.items():
        assert name in offered
        assert all(archive.digest or name == "movielens-latest-small" for archive in archives)
