"""What a preparation tells of a log: why many rows were left out, words without end, and what a part and the whole hold."""

import json
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctrsink.config.data import TextSpec
from ctrsink.prepare.tokenize import LONGEST_WORD, until_endless_word
from tests.command_line import call, good, refused
from tests.data_fixtures import write_table
from tests.prepared_in_tasks import HALF, ROWS, spec_of, write_log
from tests.runs import run_tree


def config_of(folder: Path, log: Path, items: Path | None = None, text: str = "item {item}") -> Path:
    section = spec_of(log, items).model_copy(update={"text": TextSpec(item=text)})
    config = folder / "run.yaml"
    tree = run_tree(str(folder / "data"), str(folder / "run")) | {"prepare": section.model_dump(mode="json")}
    config.write_text(json.dumps(tree))
    return config


def test_a_skip_of_more_than_a_tenth_names_its_reasons(tmp_path: Path) -> None:
    bad = [{"timestamp": "noon"}, {"timestamp": "later", "stars": "good"}, {"item": ""}, {"timestamp": 10**13}]
    rows = [row | (bad[number % 4] if number % 5 == 0 else {}) for number, row in enumerate(ROWS)]
    log = write_log(tmp_path / "log.csv", rows)
    with log.open("a") as file:
        file.write("a,b\n")
    config = config_of(tmp_path, log)
    told = call("data", "prepare", "--config", config, "--on-bad-row", "skip", "prepare.block_bytes=2000").err
    kinds = [number % 4 for number in range(0, len(rows), 5)]
    left_out = len(kinds) + 1
    assert f"left out {left_out} of {len(rows) + 1} rows ({100 * left_out / (len(rows) + 1):.0f} %): " in told
    for count, reason in (
        (kinds.count(0) + kinds.count(1), "column timestamp: a value is not a number of seconds, nor a time such as"),
        (kinds.count(2), "column item: a value is missing"),
        (kinds.count(3), "column timestamp: a value is no time in seconds since 1970"),
        (1, "2 columns instead of 4"),
    ):
        assert f"{count} rows: {reason}" in told
    write_log(log, [ROWS[0] | bad[0], *ROWS])
    assert "left out" not in call("data", "prepare", "--config", config, "--on-bad-row", "skip", "--overwrite").err
    write_log(log, [row | bad[0] for row in ROWS[:3]])
    refused(
        call("data", "prepare", "--config", config, "--on-bad-row", "skip", "--overwrite"),
        "all 3 rows are bad (3 rows: column timestamp: a value is not a number of seconds",
    )


def test_a_word_without_end_costs_no_time_and_is_named(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log.csv", ROWS)
    titles = {item: f"the {item}" for item in sorted({row["item"] for row in ROWS})}
    first, second, third, *_ = titles
    titles |= {first: "many words " * 60_000, second: f"a {'ab' * 2_000_000} end", third: "-" * 3_000_000}
    items = write_table(tmp_path / "items.jsonl", [{"item": item, "title": title} for item, title in titles.items()])
    config = config_of(tmp_path, log, items, "{title}")
    before = time.monotonic()
    result = call("data", "prepare", "--config", config)
    assert result.code == 0, result.err
    assert time.monotonic() - before < 30  # it took the square of four million
    expected = f"the texts of items '{second}', '{third}' have a word of more than {LONGEST_WORD} signs"
    assert expected in result.err


@given(st.lists(st.text(st.sampled_from("aé漢1٣-_ \n"), max_size=9), max_size=9), st.integers(0, 3))
def test_only_a_text_with_an_endless_word_is_cut(words: list[str], place: int) -> None:
    short = " ".join(words)
    assert until_endless_word(short) == short
    for sign in ("a", "7", " ", "漢"):
        whole = f"{short}|{sign * LONGEST_WORD}|{short}"
        assert until_endless_word(whole) == whole
        cut = until_endless_word(f"{short}|{sign * (LONGEST_WORD + 1 + place)}|{short}")
        assert cut == f"{short}|{sign * LONGEST_WORD}"


def test_append_tells_its_part_and_the_whole(tmp_path: Path) -> None:
    first, second = (write_log(tmp_path / f"{n}.csv", rows) for n, rows in (("a", ROWS[:HALF]), ("b", ROWS[HALF:])))
    config = config_of(tmp_path, first)
    users = [len({row["user"] for row in rows}) for rows in (ROWS[:HALF], ROWS[HALF:])]
    made = call("data", "prepare", "--config", config, "--json")
    items = len({row["item"] for row in ROWS})
    assert {key: made.json[key] for key in ("part", "users", "events")} == {"part": 0, "users": users[0], "events": HALF}
    assert f"now holds {HALF} events of {users[0]} users in {made.json['shards']} shards" in made.err
    result = call("data", "append", "--config", config, f"prepare.source.path={second}", "--json")
    added = result.json
    assert (added["part"], added["users"], added["events"]) == (1, users[1], len(ROWS) - HALF)
    counts = {"events": len(ROWS), "chronologies": sum(users), "shards": made.json["shards"] + added["shards"]}
    assert added["data_set"] == {"parts": 2, "items": items} | counts
    assert f"now holds {len(ROWS)} events of {sum(users)} chronologies in 2 parts in" in result.err
    assert good("data", "inspect", str(tmp_path / "data"))["users"] == len({row["user"] for row in ROWS})


@pytest.mark.parametrize("words", [["a"], ["a", "b"]])
def test_a_word_of_the_longest_length_is_whole(words: list[str]) -> None:
    text = " ".join(word * LONGEST_WORD for word in words)
    assert until_endless_word(text) == text
