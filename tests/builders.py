"""What several tests build: random sequences and batches, tiny random models, a small data set prepared from a table."""

import dataclasses
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from ctrsink.config.data import ColumnSpec, PrepareSpec, SourceSpec, SplitSpec, TextSpec, TokenizerSpec
from ctrsink.config.model import BackboneSpec, BiasSpec, DecoderSpec, LoraSpec, SinkSpec
from ctrsink.dataset.events import Events, UserEvents
from ctrsink.dataset.layout import Layout
from ctrsink.families.decoder.build import build_model
from ctrsink.families.decoder.encode import encode
from ctrsink.families.decoder.model import CTRModel
from ctrsink.families.facts import Wording
from ctrsink.families.registry import family_of
from ctrsink.features.categories import categories
from ctrsink.features.ragged import Ragged
from ctrsink.prepare.build import prepare
from ctrsink.sequences.batch import Batch
from ctrsink.sequences.collate import collate
from ctrsink.sequences.columns import Sequences
from ctrsink.sequences.windows import Cuts

VOCABULARY = 97
# Token tables: texts of 1 to 4 tokens, feedbacks of 0 to 2.
TEXTS = Ragged.of([np.arange(3 + 5 * i, 3 + 5 * i + n) for i, n in enumerate((1, 2, 3, 4, 2))])
FEEDBACKS = Ragged.of([np.arange(50 + 5 * i, 50 + 5 * i + n) for i, n in enumerate((0, 1, 2))])
PREFIX = np.array([90, 91])
# Of the items with these texts; the last one's is unknown. Quarters: their products are exact.
VECTORS = np.array([[4, 0, 0], [2, 3, 1], [-2, 1, 3], [1, -3, 2], [0, 0, 0]], np.float16) / 4


@st.composite
def chronologies(draw: st.DrawFn, min_events: int = 1, max_events: int = 9) -> UserEvents:
    """Any chronology over TEXTS and FEEDBACKS with at least one impression; timestamps may be equal."""
    count = draw(st.integers(min_events, max_events))

    def column(low: int, high: int) -> list[int]:
        return draw(st.lists(st.integers(low, high), min_size=count, max_size=count))

    labels = column(-1, 1)
    labels[draw(st.integers(0, count - 1))] = draw(st.integers(0, 1))
    times = np.sort(np.array(column(0, 10**9)) // draw(st.sampled_from([1, 10**8])))
    return UserEvents(np.array(column(0, 4)), np.array(column(0, 2)), times, np.array(labels, np.int8))


def random_chronology(chance: np.random.Generator, events: int) -> UserEvents:
    """Every event an impression, gaps of seconds to years."""
    gaps = np.exp(chance.uniform(0, 18, events)).astype(np.int64)
    labels = chance.integers(0, 2, events).astype(np.int8)
    return UserEvents(chance.integers(0, 5, events), chance.integers(0, 3, events), np.cumsum(gaps), labels)


def events_of(chronology: UserEvents, layout: Layout) -> Events:
    """The chronology with what `layout` tells; numbers say what happened, those of targets which item it is."""
    c = chronology
    outcome = 10 * c.texts + c.feedbacks
    return Events(
        texts=c.texts,
        feedbacks=c.feedbacks,
        timestamps=c.timestamps,
        labels=c.labels,
        known=np.arange(len(c.texts)) if c.known is None else c.known,
        tokens=TEXTS,
        vectors=VECTORS,
        numbers=(outcome[:, None] / np.arange(1, 1 + len(layout.numbers))).astype(np.float32),
        target_numbers=(c.texts[:, None] - np.arange(len(layout.target_numbers))).astype(np.float32),
        base=None if layout.base is None else (c.texts / 8).astype(np.float32),
        categories=categories((*layout.signals, *layout.target_signals), c.timestamps, c.feedbacks, layout.utc_offset_hours),
    )


def told_sequence(chronology: UserEvents, targets: np.ndarray, layout: Layout, prefix: np.ndarray = PREFIX) -> Sequences:
    """The sequence of `targets` (numbers of events in the chronology, ascending)."""
    cuts = Cuts([events_of(chronology, layout)], np.array([1]), np.array([0]), Ragged.of([targets]))
    return encode(cuts, layout, Wording(FEEDBACKS, prefix))


def random_sequence(chance: np.random.Generator, layout: Layout, events: int, prefix: np.ndarray = PREFIX) -> Sequences:
    """The sequence of the last piece of a chronology of `events` events."""
    targets = np.arange(max(0, events - layout.targets), events)
    return told_sequence(random_chronology(chance, events), targets, layout, prefix)


def random_batch(seed: int, layout: Layout, events: tuple[int, ...]) -> Batch:
    """A batch with a row per entry of `events`, the number of events in its chronology."""
    return rows_of(random_sequences(seed, layout, events))


def random_sequences(seed: int, layout: Layout, events: tuple[int, ...]) -> Sequences:
    """Those of `random_batch`."""
    chance = np.random.default_rng(seed)
    return Sequences.joined([random_sequence(chance, layout, n) for n in events])


def rows_of(sequences: Sequences, rows: Iterable[int] | None = None) -> Batch:
    """The batch of these sequences (None: of all), each of a user of its own number."""
    numbers = np.arange(len(sequences)) if rows is None else np.array(list(rows))
    return collate(sequences, numbers, numbers)


def batch_of(sequences: list[Sequences], users: list[int] | None = None, counted: list[bool] | None = None) -> Batch:
    """All `sequences` in one batch; the users are 0, 1, ... where none are given."""
    rows = np.arange(len(sequences))
    counts = None if counted is None else np.array(counted)
    return collate(Sequences.joined(sequences), rows, rows if users is None else np.array(users), counts)


def layout_on(data: Any, model: Any, manifest: Any) -> Layout:
    """The layout of a run's sections on a data set."""
    return family_of(model.family).layout(data, model, manifest)


def layout_of(
    examples: Any = "per_user", history: int = 5, targets: int = 3, signals: tuple[str, ...] = ("previous_gap",), **more: Any
) -> Layout:
    return Layout("decoder", examples, history, targets if examples == "per_user" else 1, signals, 10, **more)


def tiny_spec(
    kind: str = "llama",
    kv_heads: int = 2,
    layers: int = 2,
    bias: BiasSpec | None = None,
    sinks: bool = True,
    lora: LoraSpec | None = None,
    **more: Any,
) -> DecoderSpec:
    """A decoder of 32 dimensions; `bias` left out means one in every layer."""
    fields: dict[str, Any] = {
        "model_type": kind,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": kv_heads,
        "initializer_range": 0.2,  # large weights: a wrong attention pattern changes results visibly
    } | more.pop("fields", {})
    if sinks:
        more |= {"sinks": SinkSpec(signals=("previous_gap",), buckets=10, embedding_size=8), "bias": bias or BiasSpec(layers=1.0)}
    else:
        more |= {"sinks": None, "bias": None}
    return DecoderSpec(backbone=BackboneSpec(config=fields), lora=lora, **more)


def tiny_model(spec: DecoderSpec, seed: int = 1, precision: str = "fp32") -> CTRModel:
    return build_model(spec, VOCABULARY, seed, precision).eval()


def form_batch(examples: str, seed: int, events: tuple[int, ...], **more: Any) -> Batch:
    """A row per entry of `events`; under `per_request` with up to three candidates behind one history; `more` of the layout."""
    layout = layout_of(examples, **more)
    if examples != "per_request":
        return random_batch(seed, layout, events)
    chance, sequences = np.random.default_rng(seed), []
    for count in events:
        asked = max(0, count - 3)
        shown = random_chronology(chance, count)
        known = np.where(np.arange(count) >= asked, asked, np.arange(count))
        shown = dataclasses.replace(shown, known=known, timestamps=shown.timestamps[known])
        sequences.append(told_sequence(shown, np.arange(asked, count), layout))
    return batch_of(sequences)


def run_tree(**sections: Any) -> dict[str, Any]:
    """The smallest complete run as a plain mapping; `sections` replace whole top-level keys."""
    tree: dict[str, Any] = {
        "run_dir": "runs/x",
        "data": {"uri": "data"},
        "model": {"backbone": {"config": {"model_type": "llama"}}},
        "stages": [{"name": "one", "trainable": ["sink", "head"], "lr": {"sink": 0.01, "head": 0.02}, "steps": 4}],
    }
    return tree | sections


def make_log(seed: int, users: int) -> list[dict[str, Any]]:
    """Users of 1 to 20 events in random order; every sixth event or so is no impression."""
    chance = random.Random(seed)
    times = iter(chance.sample(range(10**9, 10**9 + 10**7), 20 * users))
    rows: list[dict[str, Any]] = []
    for user in range(users):
        for _ in range(1 + (7 * user) % 20):
            stars = None if chance.random() < 1 / 6 else chance.randint(1, 5)
            rows.append({"user": f"u{user}", "item": f"i{chance.randrange(9)}", "timestamp": next(times), "stars": stars})
    chance.shuffle(rows)
    return rows


def make_dataset(folder: Path, seed: int = 0, users: int = 14, shard_events: int = 25) -> str:
    """Prepare a log of several shards below `folder` and return the data set's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    log, items = folder / "log.jsonl", folder / "items.jsonl"
    log.write_text("".join(json.dumps(row) + "\n" for row in make_log(seed, users)))
    titles = ["Tea", "Salt and Iron", "The Long Ladder", "Oak", "A Cup", "Moss Moss Moss", "Rain", "North by Boat", "Z"]
    items.write_text("".join(json.dumps({"item": f"i{i}", "title": title}) + "\n" for i, title in enumerate(titles)))
    spec = PrepareSpec(
        source=SourceSpec(kind="table", path=str(log), items=str(items), columns=ColumnSpec(feedback="stars")),
        text=TextSpec(prefix="Likes: "),
        tokenizer=TokenizerSpec(train_vocabulary=300),
        split=SplitSpec(train=0.6, valid=0.2),
        shard_events=shard_events,
    )
    prepare(spec, str(folder / "data"))
    return str(folder / "data")
