"""Daily training: a run in chronological order goes on with what was appended to its data, as if it had been there at once."""

import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from ctrsink.config import PrepareSpec, RunSpec, parse_run
from ctrsink.dataset.manifest import read_manifest
from ctrsink.dist import Topology
from ctrsink.errors import InputError
from ctrsink.prepare.build import append, prepare
from ctrsink.run.folder import claim, identities
from ctrsink.runtime.preflight import check
from ctrsink.runtime.start import start
from ctrsink.train.checkpoint.checkpoint import find_checkpoint
from ctrsink.train.loop import Trainer
from ctrsink.train.measure import evaluate_run
from ctrsink.train.observe.telemetry import read_metrics
from ctrsink.train.same_data import require_same_data
from tests.data_fixtures import make_events, write_published_100k
from tests.runs import run_tree

EVENTS = sorted(make_events(20, 14), key=lambda event: event[3])
DAYS = (EVENTS[:117], EVENTS[117:203], EVENTS[203:])


def day(folder: Path, number: int) -> PrepareSpec:
    raw = write_published_100k(folder / f"day-{number}", DAYS[number])
    return PrepareSpec.model_validate(
        {
            "source": {"kind": "movielens", "path": str(raw)},
            "text": {"item": "{title} {genres}", "separator": ""},
            "tokenizer": {"train_vocabulary": 300},
            "shard_events": 40,
            "past_events": 5,
        }
    )


def run_on(data: Path, run_dir: Path, order: str = "chronological") -> RunSpec:
    tree = run_tree(str(data), str(run_dir))
    tree["data"] |= {"examples": "per_target", "order": order, "shuffle_shards": 2}
    del tree["stages"][1]["steps"]
    tree["stages"][0]["steps"] = 3
    tree["stages"][1] |= {"epochs": 1, "schedule": {"kind": "constant", "warmup": 0}}
    return parse_run(tree, "test")


def test_a_run_goes_on_with_each_new_day_bitwise_as_if_all_had_been_there(tmp_path: Path) -> None:
    data, daily, whole = tmp_path / "data", tmp_path / "daily", tmp_path / "whole"
    prepare(day(tmp_path, 0), str(data))
    results = [start(run_on(data, daily))]
    for number in (1, 2):
        append(day(tmp_path, number), str(data))
        results.append(start(run_on(data, daily), resume=True))
    parts = read_manifest(str(data)).parts
    seen = 0
    for result, part in zip(results, parts, strict=True):
        seen += part.splits["train"].impressions
        assert result["finished"]
        assert result["steps"] == seen // 8
        # What is measured is the newest day.
        assert result["evaluation"]["test"]["impressions"] == part.splits["test"].impressions
    assert seen % 8, "the last batch of a day should be part-filled, or nothing is shown about it"

    straight = start(run_on(data, whole))
    for split, measured in straight["evaluation"].items():
        assert measured == pytest.approx(results[-1]["evaluation"][split], rel=0, abs=0, nan_ok=True)
    assert [row["loss"] for row in read_metrics(str(whole))] == [row["loss"] for row in read_metrics(str(daily))]
    a, b = find_checkpoint(str(whole)), find_checkpoint(str(daily))
    assert a.position == b.position == seen - seen % 8
    assert all(torch.equal(a.parameters[name], b.parameters[name]) for name in a.parameters)
    assert evaluate_run(str(daily), ("test",))["test"]["impressions"] == parts[-1].splits["test"].impressions


def test_a_shuffled_run_over_several_parts_is_measured_on_the_newest(tmp_path: Path) -> None:
    """Older parts' test impressions lie before training targets of newer ones, and stand in their histories with feedback."""
    data, run_dir = tmp_path / "data", tmp_path / "run"
    prepare(day(tmp_path, 0), str(data))
    append(day(tmp_path, 1), str(data))
    result = start(run_on(data, run_dir, order="shuffled"))
    manifest = read_manifest(str(data))
    newest = {split: counts.impressions for split, counts in manifest.parts[-1].splits.items()}
    assert {split: measured["impressions"] for split, measured in result["evaluation"].items()} == {
        split: newest[split] for split in ("valid", "test")
    }
    again = evaluate_run(str(run_dir), ("train", "test"))
    assert {split: measured["impressions"] for split, measured in again.items()} == {s: newest[s] for s in ("train", "test")}
    # The rows that were written name users and events whose time lies in that part.
    written = pq.read_table(run_dir / "evaluation" / "test.parquet").to_pylist()
    shown: Counter[tuple[str, int]] = Counter()
    for shard in (shard for shard in manifest.shards if shard.part == 1):
        for row in pq.read_table(data / shard.events_file.path).to_pylist():
            times = enumerate(zip(row["timestamp"], row["label"], strict=True))
            late = [event for event, (time, label) in times if time >= manifest.split_times.valid_end and label is not None]
            shown.update((row["user"], event) for event in late)
    assert Counter((row["user"], row["event"]) for row in written) == shown


@pytest.mark.parametrize("order", ["shuffled", "chronological"])
def test_an_append_after_the_claim_is_noticed_where_it_changes_the_order(tmp_path: Path, order: str) -> None:
    data, run_dir = tmp_path / "data", tmp_path / "run"
    prepare(day(tmp_path, 0), str(data))
    spec = run_on(data, run_dir, order)
    claim(spec, False, identities(spec, read_manifest(str(data))))
    facts = check(spec)
    require_same_data(spec, read_manifest(str(data)), Topology())
    append(day(tmp_path, 1), str(data))
    if order == "chronological":  # the steps before stay what they were
        require_same_data(spec, read_manifest(str(data)), Topology())
    else:
        with pytest.raises(InputError, match="was changed while the run was starting: start it again"):
            Trainer(spec, Topology(), facts)
    prepare(day(tmp_path, 2), str(data), overwrite=True)
    with pytest.raises(InputError, match="was changed while the run was starting: start it again"):
        Trainer(spec, Topology(), facts)


RANK = """
import sys
import torch.distributed as dist
from ctrsink.dataset.manifest import read_manifest
from ctrsink.dist import Topology
from ctrsink.errors import InputError
from ctrsink.train.same_data import require_same_data
from tests.test_continual import run_on
rank, store, run_dir, *manifests = sys.argv[1:]
dist.init_process_group("gloo", init_method="file://" + store, rank=int(rank), world_size=2)
for uri in manifests:
    try:
        require_same_data(run_on(uri, run_dir), read_manifest(uri), Topology(int(rank), 2))
        print("same")
    except InputError as error:
        print("start it again" in str(error))
dist.destroy_process_group()
"""


def test_all_ranks_notice_that_one_of_them_read_another_data_set(tmp_path: Path, repository: Path) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    prepare(day(tmp_path, 0), str(before))
    shutil.copytree(before, after)
    append(day(tmp_path, 1), str(after))
    read = [(before, before, after), (before, after, before)]  # by rank, one check after another
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), tmp_path / "store", tmp_path / "run", *manifests],
            cwd=repository, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank, manifests in enumerate(read)
    ]  # fmt: skip
    for process in ranks:
        out, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        assert out.split() == ["same", "True", "True"]


def test_short_histories_of_an_appended_part_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = tmp_path / "data"
    prepare(day(tmp_path, 0), str(data))
    check(run_on(data, tmp_path / "run"))
    assert "past_events" not in caplog.text
    append(day(tmp_path, 1).model_copy(update={"past_events": 2}), str(data))
    check(run_on(data, tmp_path / "run"))
    assert "was appended with prepare.past_events 2: there histories are shorter than data.history 3" in caplog.text


def test_a_shuffled_run_does_not_go_on_with_other_data(tmp_path: Path) -> None:
    data, run_dir = tmp_path / "data", tmp_path / "run"
    prepare(day(tmp_path, 0), str(data))
    start(run_on(data, run_dir, order="shuffled"), stop_after=2)
    append(day(tmp_path, 1), str(data))
    with pytest.raises(InputError, match="was trained on another data set than the one now in"):
        start(run_on(data, run_dir, order="shuffled"), resume=True)


def test_a_run_does_not_go_on_where_its_past_was_changed(tmp_path: Path) -> None:
    data, run_dir = tmp_path / "data", tmp_path / "run"
    prepare(day(tmp_path, 1), str(data))
    start(run_on(data, run_dir), stop_after=2)
    prepare(day(tmp_path, 0), str(data), overwrite=True)
    append(day(tmp_path, 1), str(data))
    with pytest.raises(InputError, match="was trained on another data set than the one now in"):
        start(run_on(data, run_dir), resume=True)
