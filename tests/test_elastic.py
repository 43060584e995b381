"""A run that stops and goes on at any number of ranks and loader processes loses no sequence and repeats none."""

import os
import shutil
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctrsink import storage
from ctrsink.dataset.manifest import MANIFEST_NAME, SPLITS, FileEntry
from ctrsink.dataset.reader import Dataset
from ctrsink.families.registry import source_of
from ctrsink.sequences.batch import Batch
from ctrsink.stream.evaluation import evaluation_batches
from ctrsink.stream.order import Order, deal
from ctrsink.stream.stream import Step, TrainStream
from tests.builders import layout_of, make_dataset

LAYOUTS = {"per_target": layout_of("per_target", 4), "per_user": layout_of("per_user", 3, 2)}
PAST = 2  # events of the appended part that are history only


@settings(max_examples=1000)
@given(
    shards=st.integers(1, 64),
    block=st.integers(1, 8),
    world=st.integers(1, 64),
    accumulation=st.integers(1, 4),
    workers=st.integers(0, 8),
    batch=st.integers(1, 400),
    steps=st.integers(1, 5),
    cursor=st.floats(0, 3),
    seed=st.integers(0, 2**32),
)
def test_ranks_and_processes_share_out_the_canonical_order(
    shards: int, block: int, world: int, accumulation: int, workers: int, batch: int, steps: int, cursor: float, seed: int
) -> None:
    chance = np.random.default_rng(seed)
    per_shard = tuple((chance.integers(0, 998, shards) * (chance.random(shards) < 0.8)).tolist())
    per_shard = per_shard if any(per_shard) else (*per_shard[1:], 1)
    order = Order(per_shard, seed, block)
    start = int(cursor * order.total)
    taken: list[list[np.ndarray]] = [[] for _ in range(steps)]
    for process in range(max(1, workers)):
        own = Order(per_shard, seed, block)  # each process computes it for itself
        for number in range(process, steps, max(1, workers)):
            ids = own.ids(start + number * batch, batch)
            dealt = deal(ids % 50, 1.0 + ids % 50, world, accumulation)
            assert dealt.shape[:2] == (world, accumulation)
            sizes = (dealt >= 0).sum(2)
            assert sizes.max() - sizes.min() <= 1
            taken[number] += [ids[rank[rank >= 0]] for rank in dealt]
    found = np.concatenate([np.sort(np.concatenate(step)) for step in taken])
    expected = order.ids(start, steps * batch).reshape(steps, batch)
    assert found.tolist() == np.sort(expected).ravel().tolist()
    epoch = order.ids(start - start % order.total, order.total)
    assert np.array_equal(np.sort(epoch), np.arange(order.total))


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_dataset(tmp_path_factory.mktemp("log"))


def targets_of(batch: Batch) -> list[tuple[int, int]]:
    of = batch.targets
    return list(zip(of.users[of.counted].tolist(), of.events[of.counted].tolist(), strict=True))


def of_step(step: Step) -> list[tuple[int, int]]:
    return [target for batch in step.micro_batches for target in targets_of(batch)]


@pytest.mark.parametrize("examples", sorted(LAYOUTS))
@settings(max_examples=4)
@given(cuts=st.tuples(*[st.integers(1, 9)] * 3), seed=st.integers(0, 99))
def test_a_chain_of_8_2_3_8_ranks_loses_nothing_and_repeats_nothing(
    uri: str, examples: str, cuts: tuple[int, int, int], seed: int
) -> None:
    """20 sequences a step: neither 8 ranks nor 3 divide them."""
    source = source_of(Dataset(uri, keep_shards=4), "train", LAYOUTS[examples])
    total, batch = sum(source.per_shard), 20
    needed = -(-2 * total // batch)
    seen: Counter[tuple[int, int]] = Counter()
    state = {"position": 0}
    for world, accumulation, steps in zip((8, 2, 3, 8), (1, 3, 2, 2), (*cuts, max(1, needed - sum(cuts))), strict=True):
        ranks = [TrainStream(source, seed, 2, batch, accumulation, rank, world) for rank in range(world)]
        for stream in ranks:
            stream.load_state_dict(state)
        for together in zip(*(islice(stream, steps) for stream in ranks), strict=True):
            assert {len(step.micro_batches) for step in together} == {accumulation}
            assert {step.impressions for step in together} == {sum(len(of_step(step)) for step in together)}
            seen.update(target for step in together for target in of_step(step))
        assert len({stream.position for stream in ranks}) == 1
        state = ranks[-1].state_dict()
    assert state["position"] == batch * (sum(cuts) + max(1, needed - sum(cuts))) >= 2 * total

    def impressions(ids: np.ndarray) -> list[tuple[int, int]]:
        return targets_of(source.build(ids))

    order = Order(source.per_shard, seed, 2)
    expected = Counter(impressions(np.arange(total)))
    assert set(expected.values()) == {1}
    epochs, rest = divmod(state["position"], total)
    expected = Counter(dict.fromkeys(expected, epochs))
    if rest:
        expected.update(impressions(order.ids(epochs * total, rest)))
    assert seen == expected


def test_a_rank_without_a_sequence_fills_in_and_counts_nothing(uri: str) -> None:
    source = source_of(Dataset(uri), "train", LAYOUTS["per_user"])
    steps = [TrainStream(source, 1, 2, 3, 2, rank, 4).step(0) for rank in range(4)]
    assert [len(step.micro_batches) for step in steps] == [2] * 4
    batches = [batch for step in steps for batch in step.micro_batches]
    assert all(len(batch.axes["targets"].lengths) == 1 for batch in batches)
    assert sorted(batch.impressions > 0 for batch in batches) == [False] * 5 + [True] * 3
    assert sum(batch.impressions for batch in batches) == steps[0].impressions


def appended(first: str, second: str, to: Path) -> str:
    """The data set `first` with the log of `second` as one more part, whose chronologies begin with `PAST` events of history."""
    old, new = Dataset(first), Dataset(second)
    assert old.manifest.feedback_tokens == new.manifest.feedback_tokens
    shutil.copytree(first, to)
    shards = []
    for entry in new.manifest.shards:
        files = {}
        for name in ("events_file", "tokens_file"):
            file: FileEntry = getattr(entry, name)
            files[name] = file.model_copy(update={"path": file.path.replace("shards/", "shards/1-")})
            shutil.copy(Path(second) / file.path, to / files[name].path)
        shards.append(entry.model_copy(update={"part": 1, **files}))
    index = {name: column.copy() for name, column in new.index.items()}
    index["shard"] = index["shard"] + len(old.manifest.shards)
    index["past_events"] = np.minimum(PAST, new.index["train_events"])
    index["train_events"] = new.index["train_events"] - index["past_events"]
    for user, past in enumerate(index["past_events"]):
        shard, row = new.locate(user)
        index["train_impressions"][user] -= (shard.chronology(row).labels[:past] >= 0).sum()
    buffer = pa.BufferOutputStream()
    columns = {name: np.concatenate([old.index[name], index[name]]).astype(np.int32) for name in old.index}
    pq.write_table(pa.table(columns), buffer)
    content = buffer.getvalue().to_pybytes()
    (to / old.manifest.index.path).write_bytes(content)
    entry = FileEntry(path=old.manifest.index.path, bytes=len(content), sha256=storage.sha256(content))
    parts = (*old.manifest.parts, *new.manifest.parts)
    manifest = old.manifest.model_copy(update={"parts": parts, "shards": (*old.manifest.shards, *shards), "index": entry})
    (to / MANIFEST_NAME).write_text(manifest.model_dump_json())
    return str(to)


@pytest.fixture(scope="module")
def longer(uri: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("longer")
    return appended(uri, make_dataset(folder / "new", seed=1, users=30), folder / "data")


def chronological(dataset: Dataset, examples: str, position: int = 0, batch: int = 7) -> TrainStream:
    stream = TrainStream(source_of(dataset, "train", LAYOUTS[examples]), 5, 2, batch, 1, 0, 1, "chronological")
    stream.load_state_dict({"position": position})
    return stream


@pytest.mark.parametrize("examples", sorted(LAYOUTS))
def test_a_run_continues_on_just_the_appended_part(uri: str, longer: str, examples: str) -> None:
    before, after = Dataset(uri), Dataset(longer)
    stream = chronological(before, examples)
    first = list(stream)
    left = stream.order.total - stream.position
    assert 0 <= left < 7
    assert len(first) == stream.order.total // 7
    again = list(chronological(after, examples))
    assert [of_step(step) for step in again[: len(first)]] == [of_step(step) for step in first]
    resumed = chronological(after, examples, stream.position)
    rest = list(resumed)
    assert [of_step(step) for step in again[len(first) :]] == [of_step(step) for step in rest]
    seen = [target for step in first + rest for target in of_step(step)]
    source = resumed.source
    assert source.parts == (len(before.manifest.shards), len(after.manifest.shards) - len(before.manifest.shards))
    unfinished = resumed.order.ids(resumed.position, resumed.order.total - resumed.position)
    if len(unfinished):
        seen += targets_of(source.build(unfinished))
    assert sorted(seen) == impressions_of(after, "train")
    # What the old part left over goes into the first step, all else is new.
    old = [[user for user, _ in of_step(step) if user < before.manifest.users] for step in rest]
    assert bool(old[0]) == bool(left)
    assert len(rest) > 2
    assert not any(old[1:])


def impressions_of(dataset: Dataset, split: str) -> list[tuple[int, int]]:
    """(user, event) of the labelled events of a split, past events left out, by the event counts of the index."""
    found = []
    for user in range(dataset.manifest.users):
        shard, row = dataset.locate(user)
        labels = shard.chronology(row).labels
        lo, hi = dataset.events(split, user)
        assert lo >= dataset.index["past_events"][user]
        found += [(user, event) for event in range(lo, hi) if labels[event] >= 0]
    return found


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("examples", sorted(LAYOUTS))
def test_past_events_are_history_and_never_targets(longer: str, split: str, examples: str) -> None:
    dataset = Dataset(longer)
    past = dataset.index["past_events"]
    assert (past == PAST).sum() >= 3
    source = source_of(dataset, split, LAYOUTS[examples])
    batches = list(evaluation_batches(source, 5, 0, 1, None))
    assert sorted(target for batch in batches for target in targets_of(batch)) == impressions_of(dataset, split)
    users = [user for batch in batches for user, event in targets_of(batch) if event == past[user] > 0]
    if split == "train" and examples == "per_target":
        # One target a sequence.
        rows = [
            (b, i) for b in batches for i, user in enumerate(b.targets.users.tolist()) if user in users and b.targets.counted[i]
        ]
        firsts = [(b, i) for b, i in rows if b.targets.events[i] == past[b.targets.users[i]]]
        assert firsts
        assert all(b.axes["sinks"].lengths[i] == PAST for b, i in firsts)


@pytest.mark.slow
def test_memory_stays_over_10000_batches(uri: str) -> None:
    """Shards come and go all the time: three of them are held, and every epoch reads them all."""
    program = f"""
from pathlib import Path
from ctrsink.dataset.reader import Dataset
from ctrsink.families.registry import source_of
from ctrsink.stream.stream import TrainStream
from tests.test_elastic import LAYOUTS
stream = TrainStream(source_of(Dataset({uri!r}, keep_shards=3), "train", LAYOUTS["per_target"]), 0, 1, 8, 1, 0, 1)
pages = []
for number, step in enumerate(stream.steps(0, 10_000), start=1):
    if number in (1_000, 10_000):
        pages.append(int(Path("/proc/self/statm").read_text().split()[1]))
print(*pages)
"""
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=root, env=os.environ)
    assert done.returncode == 0, done.stderr
    first, last = map(int, done.stdout.split())
    assert last < 1.05 * first
