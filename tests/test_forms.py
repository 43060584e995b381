"""The three forms of examples: `per_request` is `per_target` for less work, and what `per_user` may and may not see."""

import dataclasses
import json
from collections import Counter
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ctrsink.config.data import ColumnSpec, PrepareSpec, SourceSpec, SplitSpec, TokenizerSpec
from ctrsink.config.model import BiasSpec, DecoderSpec, SinkSpec, TargetSpec
from ctrsink.config.stages import Objective, ReadoutSpec
from ctrsink.config.train import EvaluateSpec
from ctrsink.dataset.events import Events, UserEvents
from ctrsink.dataset.layout import Layout
from ctrsink.dataset.reader import Dataset
from ctrsink.evaluate.evaluator import predict
from ctrsink.families.decoder.build import build_model
from ctrsink.families.decoder.encode import encode
from ctrsink.families.decoder.model import CTRModel
from ctrsink.families.facts import Wording
from ctrsink.families.registry import source_of
from ctrsink.features.ragged import Ragged
from ctrsink.prepare.build import prepare
from ctrsink.sequences.batch import Batch
from ctrsink.sequences.collate import collate
from ctrsink.sequences.windows import Cuts, split_requests
from ctrsink.stream.stream import TrainStream
from tests.builders import (
    FEEDBACKS,
    PREFIX,
    TEXTS,
    VOCABULARY,
    batch_of,
    chronologies,
    events_of,
    make_log,
    tiny_spec,
    told_sequence,
)
from tests.padded import padded

SIGNALS: tuple[str, ...] = ("time_gap", "recency_rank", "previous_gap")
NUMBERS: tuple[str, ...] = ("deviation", "item_mean")
TARGET = TargetSpec(signals=("weekday", "item_mean", "item_count"))
READOUTS = [Objective(readout=ReadoutSpec(over=over, form=form)) for over in ("all", "sinks") for form in ("attend", "pool")]
close = torch.testing.assert_close


def spec_of(kind: str, temporal: bool, window: int | None, similarity: str | None) -> DecoderSpec:
    spec = tiny_spec(kind, bias=BiasSpec(layers=1.0, gamma=2.0))
    sinks = SinkSpec(signals=(*SIGNALS, *NUMBERS), buckets=10, embedding_size=8)
    return spec.model_copy(
        update={"sinks": sinks, "target": TARGET, "temporal": temporal, "window": window, "similarity": similarity}
    )


@lru_cache
def model_of(
    kind: str, temporal: bool, window: int | None = None, vocabulary: int = VOCABULARY, similarity: str | None = None
) -> CTRModel:
    """A tiny model whose temporal bias is random, and whose head hears the state louder than at the start."""
    model = build_model(spec_of(kind, temporal, window, similarity), vocabulary, 1).eval()
    generator = torch.Generator().manual_seed(2)
    for parameter in model.temporal.parameters():
        parameter.data.normal_(generator=generator)
    for parameter in model.head.parameters():
        parameter.data.mul_(3)
    return model


@st.composite
def asked(draw: st.DrawFn) -> UserEvents:
    """A chronology some of whose neighbours were shown together, most of them at one moment."""
    chronology = draw(chronologies(max_events=8))
    count = len(chronology.texts)
    known, times = np.arange(count), chronology.timestamps.copy()
    for event in range(1, count):
        if draw(st.booleans()):
            known[event] = known[event - 1]
            if draw(st.integers(0, 3)):
                times[event] = times[event - 1]
    return dataclasses.replace(chronology, known=known, timestamps=np.sort(times))


def layout_of(examples: str, targets: int = 1, history: int = 4, similarity: str | None = None) -> Layout:
    return Layout(
        "decoder",
        examples,  # pyright: ignore[reportArgumentType]
        history,
        targets,
        SIGNALS,
        10,
        numbers=NUMBERS,
        target_signals=TARGET.categories,
        target_numbers=TARGET.numbers,
        similarity=similarity,  # pyright: ignore[reportArgumentType]
        scales=tuple((name, 1.0, 2.0) for name in dict.fromkeys((*NUMBERS, *TARGET.numbers))),
    )


def cuts_of(chronology: UserEvents, targets: np.ndarray) -> Cuts:
    events = events_of(chronology, layout_of("per_request"))
    return Cuts([events], np.array([1]), np.array([0]), Ragged.of([targets]))


def both_forms(chronology: UserEvents, history: int) -> tuple[Batch, Batch]:
    """All impressions, one sequence each and one per request."""
    targets = np.flatnonzero(chronology.labels >= 0)
    layout = layout_of("per_target", history=history, similarity="vectors")
    apart = [told_sequence(chronology, targets[i : i + 1], layout) for i in range(len(targets))]
    cuts, _ = split_requests(cuts_of(chronology, targets))
    together = encode(cuts, dataclasses.replace(layout, examples="per_request"), Wording(FEEDBACKS, PREFIX))
    rows = np.arange(len(together))
    return batch_of(apart, [0] * len(apart)), collate(together, rows, np.zeros_like(rows))


def results(model: CTRModel, batch: Batch, objective: Objective) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits in the order of the events, and gradients."""
    model.zero_grad(set_to_none=True)
    loss, logits, _ = model(batch, objective)
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return logits[batch.targets.events.argsort()].detach(), found


@settings(max_examples=40)
@given(
    asked(),
    st.integers(0, 5),
    st.sampled_from(["llama", "qwen3"]),
    st.booleans(),
    st.sampled_from([None, 1, 2]),
    st.sampled_from(READOUTS),
)
def test_per_request_equals_per_target_in_logits_and_gradients(
    chronology: UserEvents, history: int, kind: str, temporal: bool, window: int | None, objective: Objective
) -> None:
    model = model_of(kind, temporal, window, similarity="vectors")
    apart, together = both_forms(chronology, history)
    assert together.tokens <= apart.tokens
    expected, gradients = results(model, apart, objective)
    logits, others = results(model, together, objective)
    close(logits, expected, atol=1e-5, rtol=1e-5)
    assert others.keys() == gradients.keys()
    for name, gradient in gradients.items():
        # Long sums in fp32: the tolerance grows with what is summed.
        bound = 1e-5 * max(1.0, float(gradient.abs().max()))
        close(others[name], gradient, atol=bound, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


@given(st.lists(st.tuples(asked(), st.integers(1, 4)), min_size=1, max_size=3), st.data())
def test_requests_are_split_as_by_a_plain_loop(users: list[tuple[UserEvents, int]], data: st.DataObject) -> None:
    """Pieces of several users, in one or several shards."""
    shards: list[Events] = []
    sizes: list[int] = []
    begins: list[int] = []
    pieces: list[np.ndarray] = []
    expected: list[list[int]] = []
    owners: list[int] = []
    for chronology, size in users:
        begin = 0
        if shards and data.draw(st.booleans()):  # another user of the same shard
            last = shards.pop()
            begin = len(last.texts)
            columns = [
                np.append(getattr(last, n), getattr(chronology, n))
                for n in ("texts", "feedbacks", "timestamps", "labels", "known")
            ]
            shards.append(Events(*columns, tokens=TEXTS))
        else:
            shards.append(cuts_of(chronology, np.array([0])).events[0])
            sizes.append(0)
        targets = np.flatnonzero(chronology.labels >= 0)
        for first in range(0, len(targets), size):
            piece = targets[first : first + size]
            assert chronology.known is not None
            previous = None
            for target in piece.tolist():
                moment = (chronology.known[target], chronology.timestamps[target])
                if moment != previous:
                    expected.append([])
                    owners.append(len(pieces))
                expected[-1].append(begin + target)
                previous = moment
            pieces.append(begin + piece)
            begins.append(begin)
            sizes[-1] += 1
    cuts, owner = split_requests(Cuts(shards, np.array(sizes), np.array(begins), Ragged.of(pieces)))
    rows, offsets = cuts.targets.values, cuts.targets.offsets
    assert [rows[a:b].tolist() for a, b in pairwise(offsets.tolist())] == expected
    assert owner.tolist() == owners
    assert cuts.begins.tolist() == [begins[o] for o in owners]
    ends = np.cumsum(sizes)
    assert cuts.sizes.tolist() == [sum(a <= o < b for o in owners) for a, b in pairwise([0, *ends.tolist()])]


def make_requests(folder: Path, second: bool = False) -> str:
    """A data set whose users are shown one to four items at a time; `second`: known by nothing but the moment."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = sorted(make_log(3, 14), key=lambda row: (row["user"], row["timestamp"]))
    before = None
    for number, row in enumerate(rows):
        if before is not None and before["user"] == row["user"] and number % 4:
            row["timestamp"] = before["timestamp"]
        row["page"] = f"p{row['timestamp']}" if number % 9 else None
        before = row
    rows.sort(key=lambda row: (row["timestamp"], row["user"]))
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "items.jsonl").write_text(
        "".join(json.dumps({"item": f"i{i}", "title": f"No. {i}" + " and more" * (i % 3)}) + "\n" for i in range(9))
    )
    columns = ColumnSpec(feedback="stars", request=None if second else "page")
    spec = PrepareSpec(
        source=SourceSpec(kind="table", path=str(folder / "log.jsonl"), items=str(folder / "items.jsonl"), columns=columns),
        tokenizer=TokenizerSpec(train_vocabulary=300),
        split=SplitSpec(train=0.6, valid=0.2),
        request_is_second=second,
        shard_events=25,
    )
    prepare(spec, str(folder / "data"))
    return str(folder / "data")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return Dataset(make_requests(tmp_path_factory.mktemp("requests")))


def targets_of(batch: Batch) -> list[tuple[int, int]]:
    of = batch.targets
    return list(zip(of.users[of.counted].tolist(), of.events[of.counted].tolist(), strict=True))


def impressions_of(dataset: Dataset, split: str) -> list[tuple[int, int]]:
    source = source_of(dataset, split, layout_of("per_target"))
    return sorted(targets_of(source.build(np.arange(sum(source.per_shard)))))


@pytest.mark.parametrize("split", ["train", "valid", "test"])
@pytest.mark.parametrize("targets", [1, 3, 50])
def test_requests_of_a_split_hold_each_of_its_impressions_once(dataset: Dataset, split: str, targets: int) -> None:
    source = source_of(dataset, split, layout_of("per_request", targets))
    ids = np.arange(sum(source.per_shard))
    batches = source.build_all([ids[::2][::-1], ids[1::2]] if len(ids) > 1 else [ids], [None, None])
    found = sorted(t for batch in batches for t in targets_of(batch))
    assert found == impressions_of(dataset, split)
    assert len(found) == dataset.manifest.splits[split].impressions  # pyright: ignore[reportArgumentType]
    for batch in batches:
        of = padded(batch)
        for row in range(len(of.kinds)):
            assert len(set(of.asked_times[row][of.asked_valid[row]].tolist())) == 1


def test_the_data_set_has_requests_of_several_impressions(dataset: Dataset) -> None:
    source = source_of(dataset, "train", layout_of("per_request", 50))
    batch = source.build(np.arange(sum(source.per_shard)))
    sizes = Counter(padded(batch).readout_valid.sum(1).tolist())
    assert sizes[1] > 2
    assert sum(count for size, count in sizes.items() if size > 1) > 10


@settings(max_examples=25)
@given(st.sampled_from([(1, 1), (1, 3), (2, 1), (2, 3), (3, 2), (5, 2)]), st.integers(1, 9), st.integers(1, 5))
def test_an_epoch_of_requests_trains_each_impression_once_for_any_workers(
    dataset: Dataset, sharing: tuple[int, int], batch_size: int, targets: int
) -> None:
    world, accumulation = sharing
    source = source_of(dataset, "train", layout_of("per_request", targets))
    total = sum(source.per_shard)
    found: Counter[tuple[int, int]] = Counter()
    counted = 0
    for rank in range(world):
        stream = TrainStream(source, 5, 2, batch_size, accumulation, rank, world)
        for step in stream.steps(0, total):  # `batch_size` epochs
            assert len(step.micro_batches) == accumulation
            counted += step.impressions if rank == 0 else 0
            for batch in step.micro_batches:
                found.update(targets_of(batch))
    assert found == dict.fromkeys(impressions_of(dataset, "train"), batch_size)
    assert counted == found.total()


@pytest.mark.parametrize("temporal", [False, True], ids=["plain", "temporal"])
@pytest.mark.parametrize("objective", READOUTS[::3], ids=str)
def test_an_evaluation_per_request_is_that_per_target(dataset: Dataset, temporal: bool, objective: Objective) -> None:
    model, spec = model_of("llama", temporal, vocabulary=300), EvaluateSpec(batch_size=5)
    apart, together = (
        predict(lambda batch: model(batch, objective), dataset, "test", layout, spec)
        for layout in (layout_of("per_target"), layout_of("per_request", 7))
    )
    assert together.users.tolist() == apart.users.tolist()
    assert together.events.tolist() == apart.events.tolist()
    assert np.ptp(apart.probabilities) > 0.05
    np.testing.assert_allclose(together.probabilities, apart.probabilities, atol=1e-5)


def test_what_one_second_showed_is_one_request_if_asked_for(tmp_path: Path) -> None:
    seconds = Dataset(make_requests(tmp_path, second=True))
    alone = together = 0
    for user in range(seconds.manifest.users):
        shard, row = seconds.locate(user)
        chronology = shard.chronology(row)
        assert chronology.known is not None
        expected = np.searchsorted(chronology.timestamps, chronology.timestamps)
        assert chronology.known.tolist() == expected.tolist()
        together += int((expected != np.arange(len(expected))).sum())
        alone += int((expected == np.arange(len(expected))).sum())
    assert together > 10
    assert alone > 10
