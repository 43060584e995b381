"""Parts: what is appended to a data set comes with its users' latest past events and changes nothing that is there."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from ctrsink.config.data import PrepareSpec, SplitSpec, StatisticsSpec, TextSpec
from ctrsink.dataset.manifest import WORK, Manifest, read_file, read_manifest
from ctrsink.dataset.reader import Dataset
from ctrsink.dataset.verify import verify
from ctrsink.errors import InputError, RunError
from ctrsink.prepare.build import append, prepare
from ctrsink.prepare.execute import Task, in_process
from ctrsink.prepare.tokenize import load_tokenizer
from tests.prepared_in_tasks import HALF, ROWS, Interrupted, contents, spec_of, write_log


@pytest.fixture(scope="module")
def appended(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    """The first half prepared and the second appended, and the manifest before that."""
    folder = tmp_path_factory.mktemp("appended")
    before = prepare(spec_of(write_log(folder / "a.csv", ROWS[:HALF])), str(folder / "data"))
    append(spec_of(write_log(folder / "b.csv", ROWS[HALF:]), past_events=3), str(folder / "data"))
    return folder / "data", before


def chronologies(folder: Path, part: int) -> dict[str, tuple[list[tuple[int, str]], int]]:
    """User -> (time and item of each event, number of past events), from the shards of a part."""
    dataset, found = Dataset(str(folder)), {}
    names = dataset.read_items()["id"].to_pylist()
    for user in range(dataset.manifest.users):
        shard, row = dataset.locate(user)
        if dataset.manifest.shards[int(dataset.index["shard"][user])].part == part:
            a, b = shard.offsets[row], shard.offsets[row + 1]
            events = [(int(t), names[i]) for t, i in zip(shard.timestamps[a:b], shard.items[a:b], strict=True)]
            assert events == sorted(events, key=lambda e: e[0])
            assert str(shard.users[row]) not in found
            found[str(shard.users[row])] = (events, int(dataset.index["past_events"][user]))
    return found


def test_appended_chronologies_begin_with_the_latest_past_events(appended: tuple[Path, Manifest]) -> None:
    old, new = (chronologies(appended[0], part) for part in (0, 1))
    assert set(new) == {row["user"] for row in ROWS[HALF:]}
    for user, (events, past) in new.items():
        assert past == min(3, len(old[user][0]) if user in old else 0)
        assert events[:past] == (old[user][0][-past:] if past else [])
        assert events[past:] == [(row["timestamp"], row["item"]) for row in ROWS[HALF:] if row["user"] == user]
    assert any(past == 3 for _, past in new.values())
    assert any(past < 3 for _, past in new.values())


def test_past_events_come_through_several_parts(tmp_path: Path) -> None:
    cuts = [0, 200, 210, 400, len(ROWS)]
    for number, (a, b) in enumerate(itertools.pairwise(cuts)):
        spec = spec_of(write_log(tmp_path / f"{number}.csv", ROWS[a:b]), past_events=4, split=SplitSpec(train=0.5, valid=0))
        (append if number else prepare)(spec, str(tmp_path / "data"))
    seen: dict[str, list[tuple[int, str]]] = {}
    for part in range(4):
        for user, (events, past) in chronologies(tmp_path / "data", part).items():
            assert events[:past] == seen.get(user, [])[-4:]
            seen[user] = [*seen.get(user, []), *events[past:]]
    assert sum(len(events) for events in seen.values()) == len(ROWS)


def test_appending_changes_nothing_that_is_there(appended: tuple[Path, Manifest]) -> None:
    folder, before = appended
    after = read_manifest(str(folder))
    assert after.identities[:1] == (before.identity,)
    assert after.identity != before.identity
    assert after.shards[: len(before.shards)] == before.shards
    assert after.feedback_texts[: len(before.feedback_texts)] == before.feedback_texts
    assert after.tokenizer_fingerprint == before.tokenizer_fingerprint
    assert not (folder / WORK).exists()
    names = {path.name for path in folder.rglob("*.parquet")}
    assert {"index.parquet", "items.parquet", "00000.parquet"} < names
    for entry in [*before.common_files, *(f for s in before.shards for f in (s.events_file, s.tokens_file))]:
        assert read_file(str(folder), entry)
    assert (after.events, before.events) == (len(ROWS), HALF)
    assert after.splits["train"].impressions == sum(part.splits["train"].impressions for part in after.parts)


def test_items_and_feedback_that_are_new_come_behind_the_known_ones(tmp_path: Path) -> None:
    def items(names: str) -> Path:
        path = tmp_path / f"items-{names}.csv"
        path.write_text("item,title\n" + "".join(f"{name},the {name}\n" for name in names))
        return path

    def spec(name: str, known: str, times: range, items_at: str, stars: int) -> PrepareSpec:
        rows = [{"user": "u", "item": i, "timestamp": t, "stars": t % 2 * stars} for t, i in zip(times, items_at, strict=True)]
        log = write_log(tmp_path / name, rows)
        text = TextSpec(item="{title}")
        return spec_of(log, items(known), split=SplitSpec(train=0.6, valid=0), positive_from=1).model_copy(update={"text": text})

    to = str(tmp_path / "data")
    before = prepare(spec("a.csv", "bdf", range(0, 10), "bdfbdfbdfb", 5), to)
    after = append(spec("b.csv", "abc", range(20, 30), "abcabcabca", 4), to)
    table = Dataset(to).read_items()
    assert table["id"].to_pylist() == ["b", "d", "f", "a", "c"]
    assert table["text"].to_pylist() == [f"the {name}" for name in "bdfac"]
    assert after.feedback_texts == (*before.feedback_texts, " 4\n")
    assert after.feedback_tokens[: len(before.feedback_tokens)] == before.feedback_tokens
    dataset = Dataset(to)
    shard, row = dataset.locate(dataset.manifest.users - 1)
    tokens = [shard.tokens.values[a:b].tolist() for a, b in zip(shard.tokens.offsets, shard.tokens.offsets[1:], strict=False)]
    chronology = shard.chronology(row)
    assert [load_tokenizer(to).decode(tokens[i]) for i in chronology.texts[-3:]] == ["the b", "the c", "the a"]
    assert [after.feedback_texts[i] for i in chronology.feedbacks[-2:]] == [" 0\n", " 4\n"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": slice(HALF - 1, None)}, r"begins at \d+, but the data set .* reaches to \d+ .* append events that are newer"),
        ({"positive_from": 2.0}, r"prepare.positive_from is not that of the data set .* \(4.0\)"),
        ({"text": TextSpec(item="{item}")}, "prepare.text is not that of the data set"),
        ({"statistics": StatisticsSpec(period="week")}, r"prepare.statistics.period is not that of the data set .* \(86400\)"),
    ],
)
def test_what_cannot_be_appended_is_refused_and_changes_nothing(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    to = tmp_path / "data"
    prepare(spec_of(write_log(tmp_path / "a.csv", ROWS[:HALF])), str(to))
    before = contents(to)
    spec = spec_of(write_log(tmp_path / "b.csv", ROWS[change.pop("rows", slice(HALF, None))])).model_copy(update=change)
    with pytest.raises(InputError, match=message):
        append(spec, str(to))
    assert contents(to) == before


def test_an_interrupted_append_leaves_the_data_set_as_it_was_and_goes_on(appended: tuple[Path, Manifest], tmp_path: Path) -> None:
    to = tmp_path / "data"
    first = prepare(spec_of(write_log(tmp_path / "a.csv", ROWS[:HALF])), str(to))
    spec = spec_of(write_log(tmp_path / "b.csv", ROWS[HALF:]), past_events=3)
    with pytest.raises(KeyboardInterrupt):
        append(spec, str(to), execute=Interrupted(3))
    assert read_manifest(str(to)) == first
    append(spec, str(to))
    assert contents(to) == contents(appended[0])


class Meanwhile:
    """Runs tasks here; before the last kind of them begins, something else happens."""

    def __init__(self, happen: Callable[[], object]) -> None:
        self.happen, self.calls = happen, 0

    def __call__(self, task: Task, numbers: Sequence[int]) -> Iterator[int]:
        self.calls += 1
        if self.calls == 2:
            self.happen()
        return in_process(task, numbers)


def test_of_two_appends_at_once_one_is_told_to_try_again(tmp_path: Path) -> None:
    to = str(tmp_path / "data")
    prepare(spec_of(write_log(tmp_path / "a.csv", ROWS[:HALF])), to)
    early, late = (write_log(tmp_path / f"{n}.csv", rows) for n, rows in (("b", ROWS[HALF:500]), ("c", ROWS[500:])))
    after: list[Manifest] = []
    with pytest.raises(RunError, match=r"[Rr]un this again"):
        append(spec_of(late), to, execute=Meanwhile(lambda: after.append(append(spec_of(early), to))))
    assert read_manifest(to) == after[0]
    assert verify(to, print)["files"] > 0
    manifest = append(spec_of(late), to)
    assert (manifest.events, len(manifest.parts)) == (len(ROWS), 3)
    assert verify(to, print)["files"] > 0


def test_an_append_without_item_table_needs_one_for_new_items_only(tmp_path: Path) -> None:
    items = tmp_path / "items.csv"
    items.write_text("item,title\n" + "".join(f"{name},the {name}\n" for name in "ab"))
    text = {"text": TextSpec(item="{title}")}

    def spec(name: str, start: int, names: str, table: Path | None) -> PrepareSpec:
        rows = [{"user": "u", "item": i, "timestamp": start + n, "stars": 5 * (n % 2)} for n, i in enumerate(names)]
        log = write_log(tmp_path / name, rows)
        return spec_of(log, table, split=SplitSpec(train=0.6, valid=0), positive_from=1).model_copy(update=text)

    to = str(tmp_path / "data")
    prepare(spec("a.csv", 0, "ababab", items), to)
    assert append(spec("b.csv", 10, "bababa", None), to).item_count == 2
    with pytest.raises(InputError, match=r"the item 'x' is new and has no field 'title'.*prepare.source.items"):
        append(spec("c.csv", 20, "baxaba", None), to)
