"""Times of whatever type are one second or a named row, and splits lie where their times say."""

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from ctrsink.config.data import SourceSpec, SplitSpec
from ctrsink.config.times import EARLIEST, LATEST
from ctrsink.dataset.cells import iso, moments
from ctrsink.dataset.manifest import SPLITS, read_manifest
from ctrsink.dataset.reader import Dataset
from ctrsink.errors import InputError
from ctrsink.prepare.build import append, prepare
from tests.command_line import call, good, refused
from tests.data_fixtures import write_table
from tests.prepared_in_tasks import HALF, ROWS, contents, spec_of, write_log
from tests.runs import run_tree
from tests.value_fixtures import log_rows, spec_for, write_jsonl
from tests.whole_log import read_source

NOON = 1_717_156_800  # 2024-05-31, 12:00 UTC
DAY = 86_400


def parquet(folder: Path, times: pa.Array, **options: Any) -> SourceSpec:
    """A log of as many events as there are times."""
    table = pa.table({"user": ["u"] * len(times), "item": ["a"] * len(times), "timestamp": times})
    pq.write_table(table, folder / "log.parquet", **options)
    return SourceSpec(kind="table", path=str(folder / "log.parquet"))


def at(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC).replace(tzinfo=None)


@pytest.mark.parametrize(
    "times",
    [
        pa.array([NOON, None], pa.int32()),
        pa.array([NOON, None], pa.uint64()),
        pa.array([NOON + 0.9, None], pa.float64()),
        pa.array([Decimal(NOON) + Decimal("0.9"), None]),
        pa.array([at(NOON + 0.9), None], pa.timestamp("ms")),
        pa.array([at(NOON + 0.9), None], pa.timestamp("us", "Europe/Berlin")),
        pa.array([at(NOON), None], pa.timestamp("ns")),
        pa.array(["1717156800.9", ""]),
        pa.array(["2024-05-31T14:00:00.999+02:00", " "]),
        pa.array(["2024-05-31 12:00:00 UTC", None], pa.large_string()),
    ],
    ids=lambda times: str(times.type),
)
def test_every_type_of_time_is_the_same_second(tmp_path: Path, times: pa.Array) -> None:
    with pytest.raises(InputError, match=r"log\.parquet, row 2, column timestamp: the timestamp is missing"):
        read_source(parquet(tmp_path, times))
    assert read_source(parquet(tmp_path, times), "skip").events["timestamp"].to_pylist() == [NOON]


@given(st.lists(st.integers(EARLIEST, 200_000_000_000).map(float) | st.none(), max_size=20), st.sampled_from(["s", "ms", "us"]))
def test_seconds_of_a_timestamp_are_exact_and_rounded_down(seconds: list[float | None], unit: str) -> None:
    per = {"s": 1, "ms": 10**3, "us": 10**6}[unit]
    raw = pa.array([None if s is None else int(s) * per + per - 1 for s in seconds], pa.int64())
    values, wrong = moments(raw.cast(pa.timestamp(unit)))
    assert pa.array(values, from_pandas=True).to_pylist() == seconds
    assert not wrong.any()


@given(st.datetimes(datetime(1, 1, 2), datetime(5138, 1, 1), timezones=st.timezones()))
def test_text_in_iso_8601_is_what_python_reads(moment: datetime) -> None:
    expected = (moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(seconds=1)
    text = moment.astimezone(UTC).isoformat()
    values, wrong = moments(pa.array([text, text.replace("T", " ").replace("+00:00", "Z"), text[:10]]))
    assert values[:2].tolist() == [expected] * 2
    assert values[2] == expected // DAY * DAY
    assert not wrong.any()
    assert iso(expected)[:19] == text[:19]


def test_dates_are_their_midnight_in_every_format(tmp_path: Path) -> None:
    for kind in (pa.date32(), pa.date64()):
        found = read_source(parquet(tmp_path, pa.array([at(NOON).date()], kind)))
        assert found.events["timestamp"].to_pylist() == [NOON - DAY // 2]
    for ending in ("csv", "jsonl"):
        rows = [{"user": "u", "item": "a", "timestamp": text} for text in ("2024-05-31", "2024-05-31T12:00Z", NOON)]
        log = write_table(tmp_path / f"log.{ending}", rows)
        found = read_source(SourceSpec(kind="table", path=str(log)))
        assert found.events["timestamp"].to_pylist() == [NOON - DAY // 2, NOON, NOON]


FAR = datetime(9999, 12, 31)


@pytest.mark.parametrize(
    ("times", "options", "message"),
    [
        (
            pa.array([at(NOON), FAR], pa.timestamp("us")),
            {"use_deprecated_int96_timestamps": True},
            "9999-12-31T00:00:00 lies outside",
        ),
        (pa.array([at(NOON), FAR], pa.timestamp("us")), {}, "9999-12-31T00:00:00 lies outside of the years 1 to 5138"),
        (pa.array([at(NOON), FAR], pa.timestamp("ms", "UTC")), {}, "9999-12-31T00:00:00 lies outside"),
        (pa.array([NOON, NOON * 1000]).cast(pa.timestamp("ms")), {}, None),
        (pa.array([NOON, 2**62]), {}, "4611686018427387904 is no time in seconds since 1970 .is it in milliseconds"),
        (pa.array([NOON, -(10**11)]), {}, "-100000000000 is no time in seconds"),
        (pa.array([NOON, 1e300]), {}, "[0-9]{300} is no time in seconds since 1970"),
        (pa.array([NOON, 2**63], pa.uint64()), {}, "9223372036854775808 is no time"),
        (
            pa.array([str(NOON), "2024-02-30"]),
            {},
            "'2024-02-30' is not a number of seconds, nor a time such as 2024-05-31T23:59:59Z",
        ),
        (pa.array([str(NOON), "31.05.2024"]), {}, "'31.05.2024' is not a number of seconds, nor a time"),
        (pa.array([str(NOON), "2024-05-31+02:00"]), {}, "is not a number of seconds, nor a time"),
    ],
    ids=str,
)
def test_a_time_out_of_bounds_is_a_bad_row_in_every_type(
    tmp_path: Path, times: pa.Array, options: dict[str, Any], message: str | None
) -> None:
    spec = parquet(tmp_path, times, **options)
    if message is None:  # what has its unit is no matter of guessing
        assert read_source(spec).events["timestamp"].to_pylist() == [NOON // 1000, NOON]
        return
    with pytest.raises(InputError, match=rf"log\.parquet, row 2, column timestamp: .*{message}"):
        read_source(spec)
    assert read_source(spec, "skip").events["timestamp"].to_pylist() == [NOON]


@pytest.mark.parametrize(
    ("times", "message"),
    [
        (pa.array([float(NOON)], pa.float32()), "is of type float, which is minutes off for times of today: write it as int64"),
        (pa.array([True]), "must hold seconds since 1970 or times, but it is of type bool: cast it to"),
        (pa.array([5], pa.time64("us")), "but it is of type time64"),
        (pa.array([5], pa.duration("s")), "but it is of type duration"),
        (pa.array([b"1700000000"]), "but it is of type binary"),
        (pa.array([[NOON]]), "but it is of type list"),
    ],
    ids=lambda value: str(getattr(value, "type", "")),
)
def test_a_type_that_holds_no_exact_time_is_refused(tmp_path: Path, times: pa.Array, message: str) -> None:
    with pytest.raises(InputError, match=rf"log\.parquet: column timestamp .*{message}"):
        read_source(parquet(tmp_path, times))


def run_file(folder: Path, log: Path, **split: Any) -> Path:
    """A configuration for the log; JSON is YAML."""
    section = spec_of(log).model_dump(mode="json")
    section["split"] = split or section["split"]
    config = folder / "run.yaml"
    config.write_text(json.dumps(run_tree(str(folder / "data"), str(folder / "run")) | {"prepare": section}))
    return config


def test_times_that_lie_decades_away_are_told_with_their_share(tmp_path: Path) -> None:
    old = [row | {"timestamp": 1_000 + number} for number, row in enumerate(ROWS[:3])]
    config = run_file(tmp_path, write_log(tmp_path / "log.csv", [*ROWS, *old]))
    told = call("data", "prepare", "--config", config).err
    share = f"{100 * 3 / (len(ROWS) + 3):.2g} %"
    assert (
        f"3 of {len(ROWS) + 3} events ({share}) lie more than 20 years from the median, {iso(ROWS[HALF]['timestamp'])[:4]}"
        in told
    )
    assert f"the first is of 1970-01-01T00:16:40Z, the last of {iso(ROWS[-1]['timestamp'])}" in told
    write_log(tmp_path / "log.csv", ROWS)
    assert "from the median" not in call("data", "prepare", "--config", config, "--overwrite").err


# Splits by date.

TIMES = [row["timestamp"] for row in ROWS]
FROM, TRAIN, VALID = (TIMES[len(TIMES) * share // 10] for share in (2, 6, 8))


def test_a_split_by_times_has_exactly_their_events_and_history_before_them(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log.csv", ROWS)
    manifest = prepare(spec_of(log, split=SplitSpec(train_from=FROM, train_end=TRAIN, valid_end=VALID)), str(tmp_path / "data"))
    rated = [row["timestamp"] for row in ROWS if row["stars"] not in (None, "")]
    bounds = [(FROM, TRAIN), (TRAIN, VALID), (VALID, TIMES[-1] + 1)]
    for name, (first, end) in zip(SPLITS, bounds, strict=True):
        assert manifest.splits[name].impressions == sum(first <= time < end for time in rated)
    dataset = Dataset(str(tmp_path / "data"))
    for user in range(manifest.users):
        shard, row = dataset.locate(user)
        times = shard.chronology(row).timestamps
        assert dataset.index["past_events"][user] == (times < FROM).sum()
        lo, hi = dataset.events("train", user)
        assert ((times >= FROM) & (times < TRAIN)).nonzero()[0].tolist() == list(range(lo, hi))
    assert sum(len(shard.timestamps) for shard in dataset.shards(range(len(manifest.shards)))) == len(ROWS) == manifest.events
    assert good("data", "verify", str(tmp_path / "data"))["events"] == len(ROWS)
    (part,) = good("data", "inspect", str(tmp_path / "data"))["parts"]
    assert (part["events"], part["history_only"]) == (len(ROWS), sum(time < FROM for time in TIMES))
    assert [part["splits"][name]["from"] for name in SPLITS] == [iso(first) for first, _ in bounds]
    assert sum(part["splits"][name]["events"] for name in SPLITS) == sum(time >= FROM for time in TIMES)


def test_events_that_are_history_only_are_past_events_of_what_is_appended(tmp_path: Path) -> None:
    """A part's own history is among a user's latest events, as if no train_from had been given."""
    first, second = (write_log(tmp_path / f"{n}.csv", rows) for n, rows in (("a", ROWS[:HALF]), ("b", ROWS[HALF:])))
    middle = TIMES[HALF]
    kinds = {
        "plain": {"train_end": TRAIN - (TRAIN - FROM) // 2, "valid_end": TRAIN - (TRAIN - FROM) // 2},
        "from": {"train_from": FROM, "train_end": TRAIN - (TRAIN - FROM) // 2, "valid_end": TRAIN - (TRAIN - FROM) // 2},
    }
    found: dict[str, list[bytes]] = {}
    for name, split in kinds.items():
        assert split["train_end"] < middle
        to = str(tmp_path / name)
        prepare(spec_of(first, split=SplitSpec(**split)), to)
        append(spec_of(second, past_events=100), to)
        found[name] = [value for path, value in contents(to).items() if path.startswith("shards/")]
        assert good("data", "inspect", to)["users"] == len({row["user"] for row in ROWS})
        assert good("data", "verify", to)["events"] == len(ROWS)
    assert found["plain"] == found["from"]


def test_dates_and_times_of_a_configuration_are_seconds(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log.csv", ROWS)
    day = iso(TRAIN)[:10]
    midnight = TRAIN // DAY * DAY
    config = run_file(tmp_path, log)
    overrides = [f"prepare.split={{train_end: {day}, valid_end: {iso(VALID)}, train: null, valid: null}}"]
    good("data", "prepare", "--config", config, *overrides)
    times = read_manifest(str(tmp_path / "data")).split_times
    assert (times.train_from, times.train_end, times.valid_end) == (None, midnight, VALID)
    # What is shown can be run.
    shown = call("config", "show", config, *overrides).out
    (tmp_path / "shown.yaml").write_text(shown)
    good("data", "prepare", "--config", tmp_path / "shown.yaml", "--to", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "data")


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ({"train_end": TRAIN, "valid_end": VALID, "train": 0.5}, "give either shares or times: with train_end and valid_end"),
        ({"train_end": TRAIN}, "train_end and valid_end are needed together"),
        ({"train_from": FROM}, "train_end and valid_end are needed together"),
        ({"train": None, "valid": 0.1}, "give both shares, train and valid, or both times"),
        ({"train_end": VALID, "valid_end": TRAIN}, "train_from must lie before train_end, and train_end not behind valid_end"),
        ({"train_from": TRAIN, "train_end": TRAIN, "valid_end": VALID}, "train_from must lie before train_end"),
        ({"train_end": "2024-13-01", "valid_end": VALID}, "prepare.split.train_end: '2024-13-01' is neither a date or time"),
        ({"train_end": 1.5, "valid_end": VALID}, "prepare.split.train_end: 1.5 is neither a date or time such as"),
        ({"train_end": True, "valid_end": VALID}, "prepare.split.train_end: True is neither"),
        ({"train_end": TRAIN * 1000, "valid_end": VALID}, "is no time in seconds since 1970 (is it in milliseconds?)"),
        ({"train_end": "2001-01-01", "valid_end": "2035-01-01"}, "the train split has no impression: the log reaches from"),
    ],
)
def test_a_split_that_cannot_be_is_one_line(tmp_path: Path, split: dict[str, Any], message: str) -> None:
    config = run_file(tmp_path, write_log(tmp_path / "log.csv", ROWS), **split)
    refused(call("data", "prepare", "--config", config), message)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("make", [lambda text: datetime.fromisoformat(text), lambda text: datetime.fromisoformat(text).date()])
def test_python_gives_dates_as_they_are(make: Callable[[str], Any]) -> None:
    assert SplitSpec(train_end=make("2024-05-31"), valid_end=NOON).train_end == NOON - DAY // 2
    with pytest.raises(ValidationError, match="is it in milliseconds"):
        SplitSpec(train_end=LATEST + 1, valid_end=LATEST + 1)


def test_dates_that_are_read_as_seconds_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = log_rows(["u", "v"])
    path = write_jsonl(tmp_path / "log.jsonl", rows | {"timestamp": [20240501 + n // 2 for n in range(60)]})
    prepare(spec_for(path), str(tmp_path / "data"))
    assert "20240530" in caplog.text
    assert "if these are dates, write them as 2024-05-30" in caplog.text
