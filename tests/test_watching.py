"""docs/watching.md, the rows of a real run, the gauges that a real Ray node exports and the Grafana board agree."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from ctrsink.config import parse_run
from ctrsink.runtime.gauges import gauge_of
from ctrsink.runtime.start import start
from ctrsink.train.observe.telemetry import read_metrics
from tests.runs import prepared_data, run_tree
from tests.services.ray_cluster import RayCluster

WATCHED = """
import json, sys, time, urllib.request
import ray
from ctrsink.runtime.gauges import RayGauges

ray.init(address=sys.argv[1], log_to_driver=False)
(node,) = ray.nodes()
url = f"http://127.0.0.1:{node['MetricsExportPort']}/metrics"

def scrape(until):
    for _ in range(300):
        text = urllib.request.urlopen(url, timeout=5).read().decode()
        if until(text):
            return text
        time.sleep(0.1)
    sys.exit("the node does not export it:\\n" + "\\n".join(line for line in text.splitlines() if "ctrsink" in line))

gauges = ray.remote(num_cpus=0)(RayGauges).remote("tea \\"time\\"")
first, second = json.loads(sys.argv[2])
ray.get(gauges.__call__.remote(first))
texts = [scrape(lambda text: 'ray_ctrsink_last' in text)]
ray.get(gauges.__call__.remote(second))
texts.append(scrape(lambda text: 'stage="two"' in text))
print(json.dumps(texts))
"""


@pytest.fixture(scope="module")
def page(repository: Path) -> dict[str, list[str]]:
    """The table of keys in docs/watching.md: unit, meaning, where, when by key."""
    text = (repository / "docs/watching.md").read_text("utf-8")
    rows = [
        line.strip("| ").split(" | ")
        for line in text.split("## What a row holds")[1].split("\n## ")[0].splitlines()
        if "|" in line
    ]
    return {row[0].strip("`"): row[1:] for row in rows[2:]}


@pytest.fixture(scope="module")
def board(repository: Path) -> dict[str, Any]:
    return json.loads((repository / "cluster/grafana/ctrsink.json").read_text())


def example(key: str) -> str:
    """A key of the page as it stands in a row."""
    return key.replace("GROUP", "head").replace("rankN", "rank1").replace("layerNN", "layer01")


def scraped(text: str) -> dict[str, list[tuple[dict[str, str], float]]]:
    families = text_string_to_metric_families(text)
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for sample in (sample for family in families for sample in family.samples if sample.name.startswith("ray_ctrsink_")):
        found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


def test_the_board_asks_for_what_a_ray_node_exports(
    page: dict[str, list[str]], board: dict[str, Any], ray_cluster: RayCluster
) -> None:
    """Whatever a row may hold, set in an actor and read back from the node; the board's every query is among it."""
    keys = {example(key): float(number) for number, key in enumerate(page, 1) if key != "stage"}
    first = {"stage": "one", **keys, "null": None, "nothing": math.nan, "valid/ndcg@10": 0.5, "last": 1.0}
    second = {"stage": "two", "step": 7.0, "loss": 0.25}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {**ray_cluster.env(), "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # loopback, as the head
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, ray_cluster.gcs_address, json.dumps([first, second])],
        env=environment, capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    shown, later = map(scraped, json.loads(done.stdout.splitlines()[-1]))
    for key, value in keys.items():
        name, own = gauge_of(key)
        ((labels, found),) = shown["ray_" + name]
        assert found == value, key
        assert labels.items() >= {"run": 'tea "time"', "stage": "one", **own}.items()
    assert "ray_ctrsink_valid_ndcg_10" in shown
    assert not {"ray_ctrsink_null", "ray_ctrsink_nothing"} & shown.keys()
    queries = " ".join(target["expr"] for panel in board["panels"] for target in panel["targets"])
    asked = set(re.findall(r"\bray_\w+", queries))
    assert len(asked) > 15
    assert asked <= shown.keys()
    # Ray goes on showing a stage that is over, so every query takes the one with the largest step alone.
    assert {labels["stage"]: value for labels, value in later["ray_ctrsink_loss"]} == {"one": first["loss"], "two": 0.25}
    assert {labels["stage"]: value for labels, value in later["ray_ctrsink_step"]} == {"one": 1, "two": 7}
    newest = "(ray_ctrsink_step == on (run) group_left () max by (run) (ray_ctrsink_step))"
    assert queries.count(f" and on (run, stage) {newest}") == sum(len(panel["targets"]) for panel in board["panels"])


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_the_page_lists_what_the_rows_of_a_real_run_hold(page: dict[str, list[str]], tmp_path: Path, zero_stage: int) -> None:
    data = prepared_data(str(tmp_path / "set"))
    changes: dict[str, Any] = {
        "train": {"validation": {"every": 3, "sequences": 20}, "zero_stage": zero_stage, "checkpoint_every": 5},
        "runtime": {"peak_tflops": 0.5},
        "stages": {0: {"steps": 3}, 1: {"steps": 4}},
    }
    start(parse_run(run_tree(data, str(tmp_path / "run"), **changes), "test"))
    rows = read_metrics(str(tmp_path / "run"))
    assert [row["step"] for row in rows] == list(range(1, 8))
    found = {generic(key) for row in rows for key in row}
    assert found <= page.keys()
    other_places = ("CUDA", "more than 8 ranks")
    elsewhere = {key for key, (*_, when) in page.items() if any(place in when for place in other_places)}
    assert page.keys() - found <= elsewhere
    always = {key for key, (*_, when) in page.items() if when == "always"}
    for row in rows:
        held = {generic(key) for key in row}
        assert always <= held
        assert ("valid/auc" in held) == ("gamma/layerNN" in held) == ("sink_attention/layerNN" in held)
        assert row["mfu"] == pytest.approx(row["tflops"] / 0.5)
        assert row["tflops"] > 0
    # The first stage's targets see the sinks only; gamma starts at 1 and is trained.
    looks = [row for row in rows if "gamma/layer00" in row]
    assert [row["step"] for row in looks] == [3, 6, 7]
    assert looks[0]["sink_attention/layer01"] == pytest.approx(1.0)
    assert 0 < looks[1]["sink_attention/layer01"] < 1
    assert looks[0]["gamma/layer00"] != looks[2]["gamma/layer00"] != 1.0


def generic(key: str) -> str:
    """A row's key as it stands on the page."""
    for found, written in ((r"/rank\d+$", "/rankN"), (r"/layer\d\d$", "/layerNN"), (r"^lr/\w+$", "lr/GROUP")):
        key = re.sub(found, written, key)
    return key


def test_keys_with_a_value_per_rank_layer_or_group_share_a_gauge() -> None:
    assert gauge_of("lr/backbone") == ("ctrsink_lr", {"group": "backbone"})
    assert gauge_of("gpu_memory_gib/rank12") == ("ctrsink_gpu_memory_gib", {"rank": "12"})
    assert gauge_of("sink_attention/layer00") == ("ctrsink_sink_attention", {"layer": "00"})
    assert gauge_of("memory_gib/max") == ("ctrsink_memory_gib_max", {})
    assert gauge_of("valid/auc") == ("ctrsink_valid_auc", {})


def test_the_board_can_be_imported_into_any_grafana(board: dict[str, Any]) -> None:
    """Its data source is a variable, panels have numbers and places of their own, and stand in the order in which one looks."""
    assert board["schemaVersion"] >= 38  # Grafana 10
    assert "id" not in board  # that of another Grafana's database
    variables = {variable["name"]: variable for variable in board["templating"]["list"]}
    assert (variables["datasource"]["type"], variables["datasource"]["query"]) == ("datasource", "prometheus")
    panels = board["panels"]
    sources = [part["datasource"] for panel in panels for part in (panel, *panel["targets"])] + [variables["run"]["datasource"]]
    assert sources == [{"type": "prometheus", "uid": "${datasource}"}] * len(sources)
    assert len({panel["id"] for panel in panels}) == len({(p["gridPos"]["x"], p["gridPos"]["y"]) for p in panels}) == len(panels)
    assert [panel["title"] for panel in panels] == [
        "Loss", "AUC on the validation sample", "Throughput", "Data wait", "MFU", "Memory per rank", "Gradient norm",
        "Learning rates", "Gamma", "Attention to sinks", "Checkpoint time",
    ]  # fmt: skip
    for panel in panels:
        assert all('run=~"$run"' in target["expr"] for target in panel["targets"])
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
