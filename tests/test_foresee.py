"""What the data would end a run for at some step is found before a worker starts, by what preparation has counted."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from ctrsink.dataset.layout import Layout
from ctrsink.dataset.manifest import SPLITS, read_manifest
from ctrsink.dataset.reader import Dataset
from ctrsink.dataset.splits import longest_runs
from ctrsink.errors import InputError
from ctrsink.families.foresee import longer_than, most_positions, suspects
from ctrsink.families.registry import source_of
from ctrsink.runtime import start as starting
from ctrsink.stream.stream import TrainStream
from tests.builders import make_dataset
from tests.command_line import call, good, refused
from tests.runs import run_tree
from tests.test_forms import make_requests


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A data set in which every event stands alone."""
    return make_dataset(tmp_path_factory.mktemp("alone"))


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A data set with several impressions in some requests."""
    return make_requests(tmp_path_factory.mktemp("together"))


@given(st.lists(st.lists(st.integers(0, 9), max_size=9), min_size=1, max_size=5).filter(any))
def test_the_largest_runs_are_those_of_a_search(users: list[list[int]]) -> None:
    found = longest_runs(np.array([n for user in users for n in user]), np.cumsum([0, *map(len, users)]))
    for power, largest in enumerate(found):
        assert largest == max(sum(user[i : i + 2**power]) for user in users for i in range(len(user)) if user)
    assert 2 ** (len(found) - 1) >= max(map(len, users))
    assert found[-1] == max(map(sum, users))


@settings(max_examples=25)
@given(
    examples=st.sampled_from(["per_target", "per_request", "per_user"]),
    history=st.integers(0, 25),
    targets=st.integers(1, 9),
    sinks=st.sampled_from(["signals", "numbers", None]),
    text_history=st.none() | st.integers(0, 9),
    which=st.booleans(),
)
def test_no_sequence_has_more_positions_than_its_shard_may(
    alone: str,
    together: str,
    examples: Any,
    history: int,
    targets: int,
    sinks: str | None,
    text_history: int | None,
    which: bool,
) -> None:
    dataset = Dataset(together if which and examples != "per_user" else alone)
    layout = Layout(
        "decoder",
        examples,
        history,
        1 if examples == "per_target" else targets,
        ("previous_gap",) if sinks == "signals" else (),
        4,
        numbers=("item_count",) if sinks == "numbers" else (),
        text_history=text_history if sinks else None,
        scales=(("item_count", 0.0, 1.0),),
    )
    most, longest = 0, 0
    for split in SPLITS:
        source = source_of(dataset, split, layout)
        ends = np.cumsum(source.per_shard)
        for number, (end, count) in enumerate(zip(ends.tolist(), source.per_shard, strict=True)):
            if count:
                built = source.sequences(np.arange(end - count, end))
                found = int(built.columns["position_ids"].max()) + 1
                assert found <= most_positions(dataset.manifest, layout, dataset.manifest.shards[number])
                most = max(most, found)
                longest = max(longest, max(built.lengths.tolist()))
    assert most == longest or examples == "per_request"
    assert longer_than(most, dataset, layout, SPLITS, suspects(dataset.manifest, layout, most)) is None
    assert longer_than(most - 1, dataset, layout, SPLITS, suspects(dataset.manifest, layout, most - 1)) == most


def test_requests_are_counted(alone: str, together: str) -> None:
    assert sum(shard.shared or 0 for shard in read_manifest(alone).shards) == 0
    dataset = Dataset(together)
    for number, entry in enumerate(dataset.manifest.shards):
        shard = dataset.shard(number)
        first = shard.offsets[:-1].repeat(np.diff(shard.offsets))
        behind = shard.known + first < np.arange(len(shard.known))
        assert entry.shared == int((behind & (shard.labels >= 0)).sum()) > 0


def run_of(data: str, folder: Path, **changes: Any) -> Path:
    (folder / "run.yaml").write_text(yaml.safe_dump(run_tree(data, str(folder / "run"), **changes)))
    return folder / "run.yaml"


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Runs that got as far as to start training, which they do not here."""
    found: list[str] = []
    monkeypatch.setattr(starting, "_train", lambda spec, *rest: found.append(spec.run_dir) or {})
    return found


@pytest.mark.parametrize("kind", ["local", "ray"])
def test_a_sequence_longer_than_the_backbone_ends_no_worker(alone: str, tmp_path: Path, started: list[str], kind: str) -> None:
    fields = {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 24}
    config = run_of(alone, tmp_path, model={"backbone": {"config": fields}}, runtime={"kind": kind})
    told = "llama has a rope_type dynamic, whose frequencies change after 24 positions"
    assert "lower data.history" in refused(call("train", "--config", config), told)
    assert started == []
    assert not (tmp_path / "run").exists()
    short = ["data.history=0", "data.targets=1", "data.examples=per_target"]
    for number, changes in enumerate((["model.backbone.config.max_position_embeddings=100000"], short)):
        assert good("train", "--config", config, *changes, f"run_dir={tmp_path / str(number)}")
    assert len(started) == 2


def test_a_request_that_would_show_its_answers_ends_no_worker(together: str, tmp_path: Path, started: list[str]) -> None:
    config = run_of(together, tmp_path)
    refused(call("train", "--config", config), "impressions of one request share a history, which per_user sequences cannot")
    assert started == []
    assert not (tmp_path / "run").exists()
    per_request = ["data.examples=per_request", "train.micro_batch_tokens=200"]
    for number, changes in enumerate((per_request, ["data.examples=per_target"], ["data.targets=1"])):
        assert good("train", "--config", config, *changes, f"run_dir={tmp_path / str(number)}")
    assert len(started) == 3


def test_a_data_set_from_before_there_were_counts_is_left_to_the_workers(together: str) -> None:
    manifest = read_manifest(together)
    old = [shard.model_copy(update={"shared": None, "longest": None}) for shard in manifest.shards]
    manifest = manifest.model_copy(update={"shards": tuple(old)})
    assert suspects(manifest, Layout("decoder", "per_user", 5, 4), 1) == []
    assert '"shared"' not in manifest.shards[0].model_dump_json(exclude_none=True)


@pytest.mark.parametrize("tokens", [None, 20, 400])
def test_with_fewer_sequences_than_ranks_each_is_trained_once(alone: str, tokens: int | None) -> None:
    source = source_of(Dataset(alone), "train", Layout("decoder", "per_target", 3, 1, ("previous_gap",), 4))
    for position in (0, 2, 4):
        owners: list[tuple[int, int]] = []
        for rank in range(5):
            step = TrainStream(source, 7, 2, 2, 1, rank, 5, tokens=tokens).step(position)
            assert step.impressions == 2
            for batch in step.micro_batches:
                of = batch.targets
                owners += zip(of.users[of.counted].tolist(), of.events[of.counted].tolist(), strict=True)
            filler = step.filler
            assert (filler is None) == (tokens is None)
            assert filler is None or not filler.targets.counted.any()
        assert len(owners) == len(set(owners)) == 2


def test_what_is_not_usable_is_named_where_a_library_asks(together: str) -> None:
    layout = Layout("decoder", "per_user", 5, 4)
    manifest = read_manifest(together)
    with pytest.raises(InputError, match="impressions of one request share a history"):
        longer_than(None, Dataset(together), layout, ["train"], suspects(manifest, layout, None))
