"""Log lines: for people by default, one JSON object each where asked."""

import json
import logging

import pytest

from ctrsink import logs


def test_json_lines_carry_level_rank_and_fields(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("CTRSINK_LOG_FORMAT", "json")
    logs.configure(rank=3)
    log = logging.getLogger("ctrsink.train")
    log.info("step %d", 7, extra={"fields": {"loss": 0.5}})
    log.debug("not this")
    captured = capsys.readouterr()
    assert captured.out == ""
    (row,) = map(json.loads, captured.err.splitlines())
    assert {k: row[k] for k in ("level", "logger", "rank", "message", "loss")} == {
        "level": "INFO", "logger": "ctrsink.train", "rank": 3, "message": "step 7", "loss": 0.5,
    }  # fmt: skip


def test_text_lines_are_short(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("CTRSINK_LOG_FORMAT", raising=False)
    logs.configure()
    logging.getLogger("ctrsink").warning("look here")
    assert capsys.readouterr().err.endswith("WARNING look here\n")


@pytest.mark.parametrize("sent", ["[1]", "7", '"text"', "{cut"])
def test_a_line_that_is_no_record_is_shown_as_it_is(
    sent: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("CTRSINK_LOG_FORMAT", raising=False)
    logs.configure()
    logs.relay(sent)
    assert capsys.readouterr().err.endswith(f"INFO {sent}\n")
