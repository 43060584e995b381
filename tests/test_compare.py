"""`ctrsink compare`: figures equal those of the metrics, differences are paired, and what cannot be compared is refused."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ctrsink.errors import InputError
from ctrsink.evaluate.metrics import all_metrics
from ctrsink.studies.compare import compare
from ctrsink.studies.measured import read_measured, rows_of
from tests.builders import make_dataset
from tests.command_line import call, content, good, refused
from tests.measured_runs import write_run


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_dataset(tmp_path_factory.mktemp("compare"), users=60, shard_events=100)


@pytest.fixture
def runs(data: str, tmp_path: Path) -> list[str]:
    """Three seeds of two variants, the second better."""
    skills = {"plain": 0.3, "sinks": 0.9}
    return [write_run(tmp_path / name / str(seed), data, name, seed, skills[name]) for name in skills for seed in (0, 1, 2)]


def table_of(run: str, split: str = "test") -> pa.Table:
    return pq.read_table(Path(run) / "evaluation" / f"{split}.parquet")


def rewrite(run: str, change: Callable[[pa.Table], pa.Table]) -> None:
    table, buffer = change(table_of(run)), io.BytesIO()
    pq.write_table(table, buffer)
    (Path(run) / "evaluation/test.parquet").write_bytes(buffer.getvalue())


def metrics_of(run: str) -> dict[str, float]:
    table = table_of(run)
    return all_metrics(table["label"].to_numpy(), table["probability"].to_numpy(), np.array(table["user"].to_pylist()))


def test_means_and_differences_are_those_of_the_metrics(runs: list[str]) -> None:
    found = good("compare", *runs)
    assert (found["split"], found["baseline"], found["equal_budget"]) == ("test", "plain", True)
    assert found["impressions"] == table_of(runs[0]).num_rows
    plain, sinks = ([metrics_of(run) for run in own] for own in (runs[:3], runs[3:]))
    assert [found["variants"][name]["seeds"] for name in ("plain", "sinks")] == [[0, 1, 2], [0, 1, 2]]
    for metric in ("auc", "gauc", "logloss"):
        a, b = ([each[metric] for each in own] for own in (plain, sinks))
        own = found["variants"]["sinks"]["metrics"][metric]
        assert own["runs"] == pytest.approx(b)
        assert own["mean"] == pytest.approx(np.mean(b))
        assert own["deviation"] == pytest.approx(np.std(b, ddof=1))
        assert own["by_users"][0] < own["mean"] < own["by_users"][1]
        difference = found["variants"]["sinks"]["difference"][metric]
        paired = np.subtract(b, a)
        assert difference["mean"] == pytest.approx(paired.mean())
        half = 4.302652729911275 * paired.std(ddof=1) / np.sqrt(3)  # Student's t with 2 degrees of freedom
        assert difference["by_seeds"] == pytest.approx([paired.mean() - half, paired.mean() + half])
        assert difference["pairs"] == 3
    assert found["variants"]["sinks"]["difference"]["auc"]["by_users"][0] > 0
    assert found["variants"]["sinks"]["trained"] == {"impressions": 100, "steps": 4, "seconds": 3, "flops": None}
    assert "difference" not in found["variants"]["plain"]


def test_a_model_beside_itself_differs_by_nothing_although_users_vary(data: str, tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, data, name, 0) for name in ("one", "same")]
    found = compare(runs)["variants"]["same"]
    assert found["difference"]["auc"] == {"mean": 0.0, "by_users": (0.0, 0.0), "by_seeds": None, "pairs": 1}
    assert found["metrics"]["auc"]["by_users"][1] - found["metrics"]["auc"]["by_users"][0] > 0.02


def test_the_baseline_is_the_variant_of_the_run_that_is_named(runs: list[str]) -> None:
    found = good("compare", *runs, "--baseline", runs[4] + "/")
    assert found["baseline"] == "sinks"
    assert found["variants"]["plain"]["difference"]["auc"]["mean"] < 0
    alone = good("compare", *runs[:3], "--baseline", runs[3])
    assert alone["variants"]["sinks"]["runs"] == [runs[3]]
    assert alone["variants"]["plain"]["difference"]["auc"]["pairs"] == 1


def test_runs_without_a_seed_in_common_have_no_interval_by_seeds(runs: list[str]) -> None:
    difference = compare([*runs[:2], runs[5]])["variants"]["sinks"]["difference"]["auc"]
    plain, sinks = np.mean([metrics_of(run)["auc"] for run in runs[:2]]), metrics_of(runs[5])["auc"]
    assert difference["mean"] == pytest.approx(sinks - plain)
    assert difference["pairs"] == 0
    assert difference["by_seeds"] is None


def test_slices_divide_the_impressions_and_measure_each_alone(runs: list[str]) -> None:
    found = compare(runs)
    assert list(found["slices"]) == [
        "history",
        "since the last behaviour",
        "popularity",
        "popularity decile",
        "user",
        "item",
        "day",
    ]
    for groups in found["slices"].values():
        assert sum(group["impressions"] for group in groups.values()) == found["impressions"]
    table = table_of(runs[3])
    early = found["slices"]["history"]["0 to 9"]
    chosen = table.filter(pa.compute.less(table["event"], 10))
    assert early["impressions"] == chosen.num_rows
    expected = all_metrics(
        chosen["label"].to_numpy(), chosen["probability"].to_numpy(), np.array(chosen["user"].to_pylist())
    )  # fmt: skip
    for metric in ("auc", "gauc", "logloss"):
        assert early["variants"]["sinks"]["metrics"][metric]["runs"][0] == pytest.approx(expected[metric])


def test_without_the_data_set_slices_are_left_out_and_it_says_so(data: str, runs: list[str]) -> None:
    for run in runs:
        path = Path(run) / "config.yaml"
        path.write_text(path.read_text().replace(data, data + "-gone"))
    shown = call("compare", *runs)
    assert shown.code == 0, shown.err
    assert f"slices are left out: {data}-gone holds no manifest.json" in shown.out
    assert compare(runs)["slices"] == {}


def test_another_data_set_at_that_place_gives_no_slices(runs: list[str], tmp_path: Path, data: str) -> None:
    other = make_dataset(tmp_path / "other", seed=5, users=60)
    for run in runs:
        path = Path(run) / "config.yaml"
        path.write_text(path.read_text().replace(data, other))
    assert compare(runs)["slices_left_out"] == f"{other}: these are not the impressions that the runs were measured on"


def test_the_order_of_predictions_does_not_matter(runs: list[str]) -> None:
    before = good("compare", *runs)
    rewrite(runs[4], lambda table: table.take(np.random.default_rng(0).permutation(table.num_rows)))
    assert good("compare", *runs) == before


def test_the_table_and_the_files_are_for_people(runs: list[str], tmp_path: Path) -> None:
    shown = call("compare", *runs, "--to", tmp_path / "out")
    assert shown.code == 0, shown.err
    lines = shown.out.splitlines()
    assert lines[0].startswith("test: ")
    assert any(line.split()[0] == "sinks" and "+0." in line for line in lines if line)
    assert "all runs trained on equally many impressions; seconds and FLOPs are those of training" in lines
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["comparison.json", "metrics.png", "slices.png"]
    written = json.loads((tmp_path / "out/comparison.json").read_text())
    assert written["variants"].keys() == {"plain", "sinks"}


def test_a_run_alone_has_intervals_and_figures_too(runs: list[str], tmp_path: Path) -> None:
    found = good("compare", runs[0], "--to", tmp_path / "out")
    assert found["variants"]["plain"]["metrics"]["auc"]["by_users"] is not None
    assert found["variants"]["plain"]["metrics"]["auc"]["deviation"] is None
    assert len(found["files"]) == 3


def test_unequal_budgets_are_told(data: str, runs: list[str]) -> None:
    for run in (runs[5], runs[2]):
        path = Path(run) / "result.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"impressions": 99}))
        if run == runs[5]:
            assert not compare(runs)["equal_budget"]
            assert "the budgets are NOT equal" in call("compare", *runs).out
    assert compare(runs)["equal_budget"]  # another seed may have met another number, if all of that seed have


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda table: table.slice(1), "impressions, "),
        (lambda table: table.set_column(1, "event", pa.array(table["event"].to_numpy() + 1)), "on other impressions than "),
        (lambda table: table.set_column(2, "label", pa.array(1 - table["label"].to_numpy())), "by other labels than "),
        (
            lambda table: table.set_column(0, "user", pa.array(["z" + name for name in table["user"].to_pylist()])),
            "on other impressions than ",
        ),
    ],
)
def test_runs_on_different_impressions_are_refused(
    runs: list[str], change: Callable[[pa.Table], pa.Table], what: str, tmp_path: Path
) -> None:
    rewrite(runs[4], change)
    refused(call("compare", *runs, "--to", tmp_path / "out"), runs[4], what, runs[0], "evaluate.max_sequences")
    assert not (tmp_path / "out").exists()


def test_a_model_that_diverged_is_refused(runs: list[str]) -> None:
    rewrite(runs[1], lambda table: table.set_column(3, "probability", pa.array(np.full(table.num_rows, np.nan))))
    refused(call("compare", *runs), f"{runs[1]}: ", "predictions on test are no numbers")


def test_runs_that_cannot_be_told_apart_are_refused(data: str, runs: list[str], tmp_path: Path) -> None:
    again = write_run(tmp_path / "again", data, "plain", 1)
    refused(call("compare", *runs, again), "are both called plain and have the same seed: give one of them")
    refused(call("compare", runs[0], runs[0]), "have the same seed")
    other = write_run(tmp_path / "other", data, "plain", 3, train={"batch_size": 64})
    refused(call("compare", *runs, other), "are both called plain, but train.batch_size was", "is 64: give them different names")


def test_what_is_no_run_or_was_not_measured_is_refused(runs: list[str], tmp_path: Path) -> None:
    refused(call("compare", tmp_path), f"{tmp_path} holds no run")
    refused(call("compare", runs[0], "--split", "valid"), f"{runs[0]} was not measured on valid: run `ctrsink evaluate --run")
    before = content(tmp_path)
    refused(call("compare", runs[0], "--to", Path(runs[0]) / "config.yaml"), "figures are written to a local folder")
    assert content(tmp_path) == before
    (Path(runs[1]) / "evaluation/test.parquet").write_bytes(b"PAR1 and no more")
    refused(call("compare", *runs), "evaluation/test.parquet is damaged")
    (Path(runs[0]) / "result.json").write_text("{")
    refused(call("compare", runs[0]), "result.json is damaged")


def test_a_budget_that_nobody_knows_is_not_called_equal(runs: list[str]) -> None:
    (Path(runs[0]) / "result.json").unlink()
    assert good("compare", *runs)["equal_budget"] is None
    assert "whether the budgets are equal is not known" in call("compare", *runs).out


def test_a_damaged_result_is_one_line(runs: list[str]) -> None:
    (Path(runs[0]) / "result.json").write_text("{")
    refused(call("compare", *runs), f"{runs[0]}/result.json is damaged: resume the run to write it again")


def test_impressions_that_are_there_twice_are_refused(runs: list[str]) -> None:
    shown = read_measured(runs[0], "test").impressions
    users, events = shown.names.take(pa.array(shown.users)), shown.events
    assert rows_of(shown, users, events, shown.labels, "x").tolist() == list(range(len(events)))
    twice = np.append(np.arange(len(events)), 3)
    with pytest.raises(InputError, match=rf"x: event {events[3]} of user '.*' is there twice"):
        rows_of(shown, users.take(pa.array(twice)), events[twice], shown.labels[twice], "x")
