"""Preparation as tasks: equal bytes however the log is cut and whoever reads it, and nothing lost by an interruption."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from ctrsink import storage
from ctrsink.config.data import SplitSpec
from ctrsink.dataset.manifest import read_manifest
from ctrsink.errors import InputError
from ctrsink.prepare.build import append, prepare
from tests.builders import run_tree
from tests.prepared_in_tasks import HALF, ROWS, Counting, Interrupted, contents, spec_of, write_log
from tests.services.ray_cluster import RayCluster


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The log prepared at once; `log.csv` lies beside the data set."""
    folder = tmp_path_factory.mktemp("whole")
    prepare(spec_of(write_log(folder / "log.csv", ROWS)), str(folder / "data"))
    return folder


@settings(max_examples=8)
@given(st.integers(1, 20_000), st.lists(st.integers(1, len(ROWS) - 1), max_size=3, unique=True))
def test_blocks_and_files_change_no_byte(
    whole: Path, tmp_path_factory: pytest.TempPathFactory, block_bytes: int, cuts: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("cut")
    edges = [0, *sorted(cuts), len(ROWS)]
    for number, (a, b) in enumerate(itertools.pairwise(edges)):
        write_log(folder / "log" / f"part-{number}.csv", ROWS[a:b])
    prepare(spec_of(folder / "log", block_bytes=block_bytes), str(folder / "data"))
    assert contents(folder / "data") == contents(whole / "data")


VERBS = """
import sys
from ctrsink.cli import main
for verb, config in zip(sys.argv[1::2], sys.argv[2::2]):
    print("exit code", main(["data", verb, "--config", config]))
"""


def test_ray_data_changes_no_byte(whole: Path, tmp_path: Path, ray_cluster: RayCluster) -> None:
    """Four preparations by one process that has joined a cluster: local, on S3, appended there, and of a log with a bad row."""
    uri = "s3://ctrsink-test/prepared-by-ray"
    half = write_log(tmp_path / "half.csv", ROWS[:HALF])
    rest = write_log(tmp_path / "rest.csv", ROWS[HALF:])
    broken = write_log(tmp_path / "broken.csv", [*ROWS[:300], ROWS[300] | {"stars": "good"}, *ROWS[301:]])
    arguments: list[str] = []
    for verb, log, to in (
        ("prepare", whole / "log.csv", tmp_path / "data"),
        ("prepare", half, uri),
        ("append", rest, uri),
        ("prepare", broken, tmp_path / "none"),
    ):
        section = spec_of(log, block_bytes=4_000, workers=2).model_dump(mode="json")
        tree = run_tree(prepare=section, runtime={"kind": "ray", "address": ray_cluster.gcs_address}, data={"uri": str(to)})
        config = tmp_path / f"{log.stem}.yaml"
        config.write_text(yaml.safe_dump(tree))
        arguments += [verb, str(config)]
    # As for the cluster: without it Ray looks for 127.0.0.1 at the machine's outer address.
    environment = os.environ | ray_cluster.env() | {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    command = [sys.executable, "-c", VERBS, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    codes = [line for line in done.stdout.splitlines() if line.startswith("exit code")]
    assert codes == [f"exit code {code}" for code in (0, 0, 0, 2)], done.stderr
    assert "broken.csv, row 301 (line 302), column stars: 'good' is not a number" in done.stderr
    assert not (tmp_path / "none" / "manifest.json").exists()
    assert contents(tmp_path / "data") == contents(whole / "data")
    storage.download_dir(uri, tmp_path / "fetched")
    prepare(spec_of(half), str(tmp_path / "here"))
    append(spec_of(rest), str(tmp_path / "here"))
    assert contents(tmp_path / "fetched") == contents(tmp_path / "here")


@pytest.mark.parametrize("limit", [0, 1, 6, 12, 16])
def test_an_interrupted_preparation_is_no_data_set_and_goes_on(whole: Path, tmp_path: Path, limit: int) -> None:
    spec, to = spec_of(whole / "log.csv", block_bytes=2_000), tmp_path / "data"
    every = Counting()
    prepare(spec, str(tmp_path / "once"), execute=every)
    with pytest.raises(KeyboardInterrupt):
        prepare(spec, str(to), execute=Interrupted(limit))
    with pytest.raises(InputError, match="holds no manifest"):
        read_manifest(str(to))
    rest = Counting()
    prepare(spec, str(to), execute=rest)
    assert contents(to) == contents(whole / "data")
    # The task that was under way may have ended before the machine went down.
    assert every.done - limit - 1 <= rest.done <= every.done - limit


def test_what_was_interrupted_is_not_taken_up_for_another_log(whole: Path, tmp_path: Path) -> None:
    log = write_log(tmp_path / "log.csv", ROWS[:HALF])
    with pytest.raises(KeyboardInterrupt):
        prepare(spec_of(log, block_bytes=2_000), str(tmp_path / "data"), execute=Interrupted(8))
    write_log(log, ROWS)
    prepare(spec_of(log, block_bytes=2_000), str(tmp_path / "data"))
    assert contents(tmp_path / "data") == contents(whole / "data")


@pytest.mark.parametrize(("first", "second"), [(20, 300), (300, 20)])
@pytest.mark.parametrize("limit", [3, 8])
def test_what_was_interrupted_goes_on_with_shards_of_another_size(
    whole: Path, tmp_path: Path, first: int, second: int, limit: int
) -> None:
    """Blocks are sliced as finely as the shards ask for."""
    log, to = whole / "log.csv", tmp_path / "data"
    with pytest.raises(KeyboardInterrupt):
        prepare(spec_of(log, block_bytes=2_000, shard_events=first), str(to), execute=Interrupted(limit))
    prepare(spec_of(log, block_bytes=2_000, shard_events=second), str(to))
    prepare(spec_of(log, block_bytes=2_000, shard_events=second), str(tmp_path / "fresh"))
    assert contents(to) == contents(tmp_path / "fresh")


def test_interrupted_attempts_with_two_configurations_do_not_mix(whole: Path, tmp_path: Path) -> None:
    def attempt(valid: float, limit: int) -> None:
        spec = spec_of(whole / "log.csv", block_bytes=2_000, split=SplitSpec(train=0.6, valid=valid))
        prepare(spec, str(tmp_path / "data"), execute=Interrupted(limit))

    for valid, limit in ((0.2, 14), (0.1, 4)):  # each stops in the middle of the shards
        with pytest.raises(KeyboardInterrupt):
            attempt(valid, limit)
    attempt(0.2, 1000)
    assert contents(tmp_path / "data") == contents(whole / "data")


def test_a_failed_repetition_keeps_what_was_done(whole: Path, tmp_path: Path) -> None:
    spec, to = spec_of(whole / "log.csv", block_bytes=2_000), str(tmp_path / "data")
    with pytest.raises(KeyboardInterrupt):
        prepare(spec, to, execute=Interrupted(5))
    with pytest.raises(InputError, match="does not exist"):
        prepare(spec_of(tmp_path / "typo.csv"), to)
    rest = Counting()
    prepare(spec, to, execute=rest)
    every = Counting()
    prepare(spec, str(tmp_path / "once"), execute=every)
    assert rest.done <= every.done - 5


@pytest.mark.parametrize("name", ["shards", "tokenizer"])
def test_folders_that_are_not_ours_stay(whole: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "model" / name).mkdir(parents=True)
    (tmp_path / "model" / name / "tokenizer.json").write_text("mine")
    with pytest.raises(InputError, match=f"holds a folder {name} that is not a data set's"):
        prepare(spec_of(whole / "log.csv"), str(tmp_path / "model"))
    assert contents(tmp_path / "model") == {f"{name}/tokenizer.json": b"mine"}


def test_an_old_data_set_stays_until_the_new_log_is_known_to_be_good(whole: Path, tmp_path: Path) -> None:
    to = tmp_path / "data"
    prepare(spec_of(whole / "log.csv"), str(to))
    log = write_log(tmp_path / "log.csv", [*ROWS[:200], ROWS[0] | {"item": ""}])
    with pytest.raises(InputError, match="row 201"):
        prepare(spec_of(log), str(to), overwrite=True)
    assert contents(to) == contents(whole / "data")
    with pytest.raises(KeyboardInterrupt):
        prepare(spec_of(whole / "log.csv", block_bytes=2_000), str(to), overwrite=True, execute=Interrupted(3))
    assert read_manifest(str(to)) == read_manifest(str(whole / "data"))


def test_a_bad_row_is_counted_over_the_blocks_of_its_file(tmp_path: Path) -> None:
    rows = [*ROWS[:400], ROWS[400] | {"timestamp": "noon"}, *ROWS[401:]]
    write_log(tmp_path / "log" / "a.csv", ROWS[:100])
    write_log(tmp_path / "log" / "b.csv", rows)
    spec = spec_of(tmp_path / "log", block_bytes=1_000)
    with pytest.raises(InputError, match=r"b\.csv, row 401 \(line 402\), column timestamp: 'noon' is not a number"):
        prepare(spec, str(tmp_path / "data"))
    assert not (tmp_path / "data").exists()
    manifest = prepare(spec, str(tmp_path / "data"), on_bad_row="skip")
    assert (manifest.events, manifest.skipped_rows) == (100 + len(ROWS) - 1, 1)
