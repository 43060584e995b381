"""The stream over a prepared data set: the same global batches for any number of workers, each impression once in evaluation."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ctrsink.attention.kinds import FEEDBACK, PAD, SINK
from ctrsink.dataset.layout import Layout
from ctrsink.dataset.manifest import SPLITS, FileEntry, read_file
from ctrsink.dataset.reader import Dataset
from ctrsink.errors import InputError
from ctrsink.families.registry import source_of
from ctrsink.sequences.batch import Batch
from ctrsink.stream.evaluation import evaluation_batches
from ctrsink.stream.stream import SequenceSource, Step, TrainStream, read_ahead
from tests.builders import layout_of, make_dataset, make_log
from tests.padded import padded, same

LAYOUTS = {"per_target": layout_of("per_target", 4), "per_user": layout_of("per_user", 3, 2)}
worlds = st.sampled_from([(1, 1), (1, 2), (1, 3), (2, 1), (2, 3), (3, 1), (3, 2), (6, 1)])


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_dataset(tmp_path_factory.mktemp("log"))


@pytest.fixture(scope="module")
def dataset(uri: str) -> Dataset:
    return Dataset(uri)


def sourced(dataset: Dataset, split: str = "train", examples: str = "per_user") -> SequenceSource:
    return source_of(dataset, split, LAYOUTS[examples])


def targets_of(batch: Batch) -> list[tuple[int, int]]:
    of = batch.targets
    return list(zip(of.users[of.counted].tolist(), of.events[of.counted].tolist(), strict=True))


def impressions_of(dataset: Dataset, split: str) -> list[tuple[int, int]]:
    """(user, event) of every labelled event whose time lies in the split, from the shards and the split times alone."""
    times, found = dataset.manifest.split_times, []
    for user in range(dataset.manifest.users):
        shard, row = dataset.locate(user)
        chronology = shard.chronology(row)
        for event, (time, label) in enumerate(zip(chronology.timestamps, chronology.labels, strict=True)):
            where = "train" if time < times.train_end else "valid" if time < times.valid_end else "test"
            if label >= 0 and where == split:
                found.append((user, event))
    return found


def same_steps(one: Step, other: Step) -> bool:
    pairs = zip(one.micro_batches, other.micro_batches, strict=True)
    return all(same(a, b) for a, b in pairs) and (one.impressions, one.position) == (other.impressions, other.position)


def test_the_data_set_has_what_these_tests_are_about(dataset: Dataset) -> None:
    assert len(dataset.manifest.shards) >= 4
    assert any((dataset.shard(n).labels < 0).any() for n in range(4))
    assert len(dataset.prefix)


def test_the_shards_hold_the_log(dataset: Dataset) -> None:
    logged = sorted((r["user"], r["timestamp"], r["item"], float(r["stars"] or -1)) for r in make_log(0, 14))
    items = dataset.read_items()["id"].to_pylist()
    found = []
    for number in range(len(dataset.manifest.shards)):
        shard = dataset.shard(number)
        for row, user in enumerate(shard.users):
            c = shard.chronology(row)
            assert (np.diff(c.timestamps) >= 0).all()
            names = [items[i] for i in shard.items[shard.offsets[row] : shard.offsets[row + 1]]]
            found += [(user, int(t), name, c.labels[i] >= 0) for i, (t, name) in enumerate(zip(c.timestamps, names, strict=True))]
    assert sorted(found) == [(u, t, i, stars > 0) for u, t, i, stars in logged]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("layout", [layout_of("per_target", 4), layout_of("per_user", 3, 2), layout_of("per_user", 0, 50)])
def test_sequences_of_a_split_hold_each_of_its_impressions_once(dataset: Dataset, split: str, layout: Layout) -> None:
    source = source_of(dataset, split, layout)
    ids = np.arange(sum(source.per_shard))
    batch = source.build(ids)
    assert sorted(targets_of(batch)) == impressions_of(dataset, split)
    assert source.impressions(ids).tolist() == batch.axes["targets"].lengths.tolist()
    assert batch.impressions == dataset.manifest.splits[split].impressions  # pyright: ignore[reportArgumentType]
    users = batch.targets.users[batch.axes["targets"].offsets[:-1]].numpy()
    shards = dataset.index["shard"][users]
    assert (np.diff(shards) >= 0).all()
    assert np.bincount(shards, minlength=len(source.per_shard)).tolist() == list(source.per_shard)


def test_labels_and_text_are_those_of_the_target(dataset: Dataset) -> None:
    """Read back through the tables of the data set: the readout is the last token of the target's item."""
    source = sourced(dataset, "test")
    packed = source.build(np.arange(sum(source.per_shard)))
    batch, asked = padded(packed), iter(targets_of(packed))
    for b in range(len(batch.input_ids)):
        for slot in torch.nonzero(batch.readout_valid[b])[:, 0]:
            user, event = next(asked)
            shard, row = dataset.locate(user)
            chronology = shard.chronology(row)
            text = shard.tokens.take(chronology.texts[event : event + 1]).tolist()
            end = int(batch.readout_positions[b, slot]) + 1
            assert batch.input_ids[b, end - len(text) : end].tolist() == text
            assert batch.labels[b, slot] == chronology.labels[event]
            assert int(batch.kinds[b, end]) in (FEEDBACK, SINK, PAD)


def stream_of(dataset: Dataset, world: int = 1, rank: int = 0, accumulation: int = 1, examples: str = "per_user") -> TrainStream:
    return TrainStream(sourced(dataset, "train", examples), 5, 2, 12, accumulation, rank, world)


@settings(max_examples=25)
@given(worlds, st.sampled_from(sorted(LAYOUTS)), st.integers(0, 90))
def test_a_step_is_the_same_global_batch_for_any_workers(
    dataset: Dataset, sharing: tuple[int, int], examples: str, position: int
) -> None:
    world, accumulation = sharing
    whole = stream_of(dataset, examples=examples).step(position)
    expected = Counter(targets_of(whole.micro_batches[0]))
    steps = [stream_of(dataset, world, rank, accumulation, examples).step(position) for rank in range(world)]
    found: Counter[tuple[int, int]] = Counter()
    for step in steps:
        assert len(step.micro_batches) == accumulation
        assert {len(b.axes["targets"].lengths) for b in step.micro_batches} == {12 // (world * accumulation)}
        assert step.position == position + 12
        for batch in step.micro_batches:
            found.update(targets_of(batch))
    assert found == expected
    assert {s.impressions for s in steps} == {sum(b.impressions for s in steps for b in s.micro_batches)}
    assert whole.impressions == steps[0].impressions


def test_an_epoch_trains_each_impression_once(dataset: Dataset) -> None:
    stream = TrainStream(sourced(dataset), 1, 2, 1, 1, 0, 1)
    total = stream.order.total
    for epoch in range(2):
        found = [t for s in stream.steps(epoch * total, total) for b in s.micro_batches for t in targets_of(b)]
        assert sorted(found) == impressions_of(dataset, "train")


def test_a_step_depends_on_its_position_alone(uri: str) -> None:
    used, fresh = stream_of(Dataset(uri)), stream_of(Dataset(uri, keep_shards=1))
    used.step(100)
    assert same_steps(used.step(24), fresh.step(24))
    assert same_steps(used.step(24), used.step(24))


def test_sources_of_two_layouts_share_a_data_set(uri: str) -> None:
    """Each builds what its own layout tells, whichever was made last."""
    dataset = Dataset(uri)
    scales = tuple((name, scale.mean, scale.deviation) for name, scale in dataset.manifest.numbers.items())
    layouts = [
        layout_of("per_target", signals=(), numbers=numbers, scales=scales)
        for numbers in (("deviation", "item_mean"), ("item_mean", "deviation"))
    ]
    sources = [source_of(dataset, "train", layout) for layout in layouts]
    ids = np.arange(40)
    first, second = (source.build(ids) for source in sources)
    one, other = (batch.inputs["sink_numbers"] for batch in (first, second))
    assert float(one[..., 0].std()) > 0
    assert torch.equal(one, other.flip(-1))
    assert not torch.equal(one, other)
    assert same(sources[0].build(ids), first)


def test_steps_are_the_steps_one_after_another(dataset: Dataset) -> None:
    stream = stream_of(dataset, 2, 1, 2)
    ahead = list(stream.steps(7, 4))
    position = 7
    for step in ahead:
        assert same_steps(step, stream.step(position))
        position = step.position
    assert len(ahead) == 4


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 5, 64])
@pytest.mark.parametrize("examples", sorted(LAYOUTS))
def test_evaluation_sees_each_impression_once_over_all_ranks(
    dataset: Dataset, world: int, batch_size: int, examples: str
) -> None:
    source = sourced(dataset, "test", examples)
    ranks = [list(evaluation_batches(source, batch_size, rank, world, None)) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    assert {len(b.axes["targets"].lengths) for batches in ranks for b in batches} == {batch_size}
    assert sorted(t for batches in ranks for b in batches for t in targets_of(b)) == impressions_of(dataset, "test")


def test_a_sample_is_fixed_and_spread_over_the_shards(dataset: Dataset) -> None:
    source = sourced(dataset, "train", "per_target")

    def sample(count: int, batch_size: int, world: int) -> list[tuple[int, int]]:
        ranks = range(world)
        return sorted(t for r in ranks for b in evaluation_batches(source, batch_size, r, world, count) for t in targets_of(b))

    first = sample(20, 4, 1)
    assert len(set(first)) == 20
    assert first == sample(20, 3, 2)
    assert set(sample(10, 4, 1)) < set(first)
    assert len({int(dataset.index["shard"][user]) for user, _ in first}) >= 3
    assert sample(10**6, 16, 1) == impressions_of(dataset, "train")


def test_evaluation_opens_each_shard_once_even_if_few_fit_in_memory(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sorting all sequences by length would read a shard anew for nearly every sequence."""
    opened: list[str] = []

    def read(uri: str, entry: FileEntry) -> bytes:
        opened.append(entry.path)
        return read_file(uri, entry)

    monkeypatch.setattr("ctrsink.stream.evaluation.WINDOW", 2)
    monkeypatch.setattr("ctrsink.dataset.reader.read_file", read)
    dataset = Dataset(uri, keep_shards=3)
    for _ in evaluation_batches(sourced(dataset, "train", "per_target"), 4, 0, 1, None):
        pass
    assert sorted(opened) == sorted(
        ["index.parquet", *(f.path for s in dataset.manifest.shards for f in (s.events_file, s.tokens_file))]
    )


@pytest.mark.parametrize("world", [1, 2])
def test_evaluation_of_a_sample_opens_each_shard_once(uri: str, monkeypatch: pytest.MonkeyPatch, world: int) -> None:
    """A few sequences of each shard: a window of so many sequences would reach over all of them."""
    opened: list[str] = []

    def read(uri: str, entry: FileEntry) -> bytes:
        opened.append(entry.path)
        return read_file(uri, entry)

    monkeypatch.setattr("ctrsink.dataset.reader.read_file", read)
    for rank in range(world):
        dataset = Dataset(uri, keep_shards=2)
        assert len(dataset.manifest.shards) > 4
        opened.clear()
        for _ in evaluation_batches(sourced(dataset, "train", "per_target"), 2, rank, world, 41):
            pass
        assert max(Counter(opened).values()) == 1


def test_a_read_ahead_that_failed_is_tried_again_when_it_is_needed(tmp_path: Path) -> None:
    uri = make_dataset(tmp_path)
    dataset, path = Dataset(uri, keep_shards=4), Path(uri) / "shards/00001.parquet"
    path.rename(tmp_path / "away")
    dataset.read_ahead((1, 2))
    dataset.shard(2)  # read behind it: by now the first has failed
    (tmp_path / "away").rename(path)
    assert len(dataset.shard(1).users)


def test_the_end_of_the_program_does_not_wait_for_a_read_that_hangs(tmp_path: Path) -> None:
    uri = make_dataset(tmp_path)
    (tmp_path / "program.py").write_text(
        "import sys, threading\n"
        "from ctrsink.dataset.reader import Dataset\n"
        "dataset = Dataset(sys.argv[1])\n"
        "dataset.read_ahead((1, 2))\n"
        "print(*(thread.name for thread in threading.enumerate()))\n"
    )
    path = Path(uri) / "shards/00001.parquet"
    path.unlink()
    os.mkfifo(path)  # whoever opens it to read waits for a writer, for ever
    done = subprocess.run([sys.executable, tmp_path / "program.py", uri], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "ctrsink-reading" in done.stdout


def test_a_split_without_impressions_is_refused(tmp_path: Path) -> None:
    dataset = Dataset(make_dataset(tmp_path))
    dataset.index["valid_impressions"] = np.zeros(dataset.manifest.users, np.int32)
    with pytest.raises(InputError, match="no impression in its valid split"):
        source_of(dataset, "valid", LAYOUTS["per_user"])


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "altered":
        path.write_bytes(content[:40] + bytes([content[40] ^ 1]) + content[41:])
    elif how == "truncated":
        path.write_bytes(content[:-7])
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["altered", "truncated", "missing"])
@pytest.mark.parametrize("name", ["shards/00001.parquet", "shards/00001.tokens.parquet", "index.parquet"])
def test_a_damaged_file_is_named_when_it_is_read(tmp_path: Path, how: str, name: str) -> None:
    uri = make_dataset(tmp_path)
    damage(Path(uri) / name, how)
    with pytest.raises(InputError, match=f"{name} .*(prepare)") as caught:
        list(stream_of(Dataset(uri)).steps(0, 8))
    assert "\n" not in str(caught.value)
    assert how in str(caught.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_shard_ends_the_stream_with_one_line(tmp_path: Path, workers: int) -> None:
    uri = make_dataset(tmp_path)
    stream = TrainStream(sourced(Dataset(uri)), 5, 1, 3, 1, 0, 1, workers=workers)
    damage(Path(uri) / "shards/00002.parquet", "altered")
    with pytest.raises(InputError, match=r"shards/00002.parquet .*prepare") as caught:
        list(stream.steps(0, 60))
    assert "\n" not in str(caught.value)


def test_processes_make_the_same_steps_and_leave_the_random_numbers_alone(uri: str) -> None:
    def run(workers: int) -> tuple[list[Step], torch.Tensor]:
        stream = TrainStream(sourced(Dataset(uri)), 5, 2, 12, 2, 1, 2, workers=workers)
        torch.manual_seed(3)
        return list(stream.steps(9, 7)), torch.rand(3)

    (expected, number), (found, other) = run(0), run(2)
    assert all(same_steps(a, b) for a, b in zip(expected, found, strict=True))
    assert torch.equal(number, other)


def test_a_process_does_not_run_the_program_that_started_it(tmp_path: Path) -> None:
    """A script without a guard around its work would start again in each process, and bring Ray and DeepSpeed there."""
    (tmp_path / "heavy.py").touch()
    (tmp_path / "loaded.py").write_text("import sys\nimport ctrsink.stream.stream\ndef names(i):\n    return list(sys.modules)\n")
    (tmp_path / "program.py").write_text(
        "print('started')\n"
        "import heavy, loaded\n"
        "from ctrsink.stream.ahead import in_processes\n"
        "(found,) = in_processes(loaded.names, 1, 1)\n"
        "print(sorted({'ray', 'deepspeed', 'heavy', 'loaded', 'torch'} & set(found)))\n"
    )
    done = subprocess.run([sys.executable, tmp_path / "program.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["started", "['loaded', 'torch']"]


def test_the_state_is_what_was_handed_out(dataset: Dataset) -> None:
    stream = stream_of(dataset)
    steps = iter(stream)
    assert stream.state_dict() == {"version": 1, "position": 0}
    for number in (1, 2, 3):
        assert next(steps).position == 12 * number
        assert stream.state_dict() == {"version": 1, "position": 12 * number}  # more are built by now
    other = stream_of(dataset)
    other.load_state_dict(stream.state_dict())
    assert same_steps(next(iter(other)), next(steps))


def test_the_next_shards_are_read_while_a_block_is_consumed(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []

    def read(uri: str, entry: FileEntry) -> bytes:
        opened.append(entry.path)
        return read_file(uri, entry)

    monkeypatch.setattr("ctrsink.dataset.reader.read_file", read)
    dataset = Dataset(uri, keep_shards=4)
    stream = TrainStream(sourced(dataset), 5, 2, 1, 1, 0, 1)
    now = {int(s) for s in np.unique(dataset.index["shard"][stream.step(0).micro_batches[0].targets.users.numpy()])}
    after = stream.order.shards_after(0)
    assert len(after) == 2
    for number in (*now, *after):
        dataset.shard(number)  # waits for those that are being read
    assert sorted(opened) == sorted(
        [
            "index.parquet",
            *(f.path for n in {*now, *after} for s in [dataset.manifest.shards[n]] for f in (s.events_file, s.tokens_file)),
        ]
    )


def test_read_ahead_raises_an_error_in_its_turn() -> None:
    def make(i: int) -> int:
        if i == 3:
            raise InputError("the fourth")
        return i * i

    stream = read_ahead(make, 6)
    assert [next(stream) for _ in range(3)] == [0, 1, 4]
    with pytest.raises(InputError, match="the fourth"):
        next(stream)


def test_read_ahead_makes_few_values_that_nobody_asked_for() -> None:
    made: list[int] = []
    stream = read_ahead(lambda i: made.append(i) or i, 100, depth=2)
    assert next(stream) == 0
    stream.close()  # pyright: ignore[reportAttributeAccessIssue]
    # One was taken, two wait in the queue, one more may be in the making.
    assert len(made) <= 4
    assert list(read_ahead(lambda i: i, 0)) == []
