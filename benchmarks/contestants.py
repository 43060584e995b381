"""The loaders in the ring: each opens the same impressions and yields a Batch after the other."""

import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from benchmarks.impressions import Samples, to_batch
from benchmarks.optional import huggingface, mosaic
from ctrsink import storage
from ctrsink.dataset.layout import Layout
from ctrsink.dataset.reader import Dataset
from ctrsink.families.registry import source_of
from ctrsink.sequences.batch import Batch
from ctrsink.stream.stream import SequenceSource, TrainStream

OURS = "ctrsink"
SHUFFLE_SHARDS = 8  # the default of data.shuffle_shards


@dataclass(frozen=True)
class Task:
    """One contestant before one data set."""

    contestant: str
    workers: int
    """Loader processes beside this one."""
    batch_size: int
    history: int
    signals: tuple[str, ...]
    total: int
    """Impressions of an epoch."""
    data: str
    mds: str
    parquet: str
    """Where the three forms lie, local or s3://."""
    scratch: str
    """A local folder for what a contestant must keep."""

    @property
    def shuffle_buffer(self) -> int:
        """Impressions in the buffer of `datasets`, which loses them when it resumes: few enough that some are left at 90 %."""
        return max(1, min(10_000, self.total // 50))

    def state_file(self, seed: int) -> Path:
        """Where a contestant whose position is no integer keeps it."""
        return Path(self.scratch) / f"{self.contestant}-{seed}.json"

    def position(self, share: float) -> int:
        """Impressions before `share` of an epoch, whole batches."""
        return int(share * self.total) // self.batch_size * self.batch_size


Open = Callable[[Task, int, float], Iterator[Batch]]


def source(task: Task) -> SequenceSource:
    """The impressions as ours sees them; the other forms are made from it, and it says what is right."""
    layout = Layout("decoder", "per_target", task.history, 1, task.signals, 100 if task.signals else 1)
    return source_of(Dataset(task.data), "train", layout)


def open_ours(task: Task, seed: int, share: float) -> Iterator[Batch]:
    """TrainStream as training uses it: a thread or processes build ahead."""
    stream = TrainStream(source(task), seed, SHUFFLE_SHARDS, task.batch_size, 1, 0, 1, workers=task.workers)
    stream.load_state_dict({"position": task.position(share)})
    for step in stream:
        yield from step.micro_batches


def open_mosaic(task: Task, seed: int, share: float) -> Iterator[Batch]:
    """StreamingDataset over MDS shards with its own loader; shuffled by its default algorithm over all samples."""
    library = mosaic()
    remote = storage.is_remote(task.mds)
    place = {"remote": task.mds, "local": tempfile.mkdtemp(dir=task.scratch)} if remote else {"local": task.mds}
    dataset = library.StreamingDataset(**place, batch_size=task.batch_size, shuffle=True, shuffle_seed=seed)
    loader = library.StreamingDataLoader(
        dataset, batch_size=task.batch_size, num_workers=task.workers, collate_fn=partial(_from_mds, len(task.signals))
    )
    if share:
        at = {"epoch": 0, "sample_in_epoch": task.position(share), "num_canonical_nodes": 1, "shuffle_seed": seed}
        loader.load_state_dict(at | {"initial_physical_nodes": 1})
    for wrapped in loader:
        yield wrapped["batch"][0]


def _from_mds(signals: int, rows: list[dict[str, bytes]]) -> dict[str, Any]:
    def flat(name: str, dtype: type) -> np.ndarray:
        return np.frombuffer(b"".join([row[name] for row in rows]), dtype)

    samples = Samples(
        head=flat("head", np.int64).reshape(-1, 3),
        lengths=np.array([len(row["kinds"]) for row in rows]),
        input_ids=flat("input_ids", np.int32),
        kinds=flat("kinds", np.uint8),
        event_ids=flat("event_ids", np.int16),
        signals=flat("signals", np.int16),
    )
    # The loader takes the length of the first value for the number of samples.
    return {"samples": samples.lengths, "batch": [to_batch(samples, signals)]}


def _parquet(task: Task, seed: int, form: str) -> Any:
    files = [storage.join(task.parquet, name) for name in storage.list_files(task.parquet)]
    dataset = huggingface().load_dataset("parquet", data_files=files, split="train", streaming=True)
    return dataset.with_format(form).shuffle(seed=seed, buffer_size=task.shuffle_buffer)


def open_rows(task: Task, seed: int, share: float) -> Iterator[Batch]:
    """`datasets` as its guide has it: rows as numpy arrays, torch's DataLoader, a function that collates."""
    dataset = _resume(_parquet(task, seed, "numpy"), task, seed, share)
    collate = partial(_from_rows, len(task.signals))
    yield from DataLoader(dataset, batch_size=task.batch_size, num_workers=task.workers, collate_fn=collate)


def _from_rows(signals: int, rows: list[dict[str, Any]]) -> Batch:
    def flat(name: str) -> np.ndarray:
        return np.concatenate([row[name] for row in rows])

    samples = Samples(
        head=np.array([[row["user"], row["event"], row["label"]] for row in rows]),
        lengths=np.array([len(row["kinds"]) for row in rows]),
        input_ids=flat("input_ids"),
        kinds=flat("kinds"),
        event_ids=flat("event_ids"),
        signals=flat("signals"),
    )
    return to_batch(samples, signals)


def open_tables(task: Task, seed: int, share: float) -> Iterator[Batch]:
    """`datasets` at its fastest: Arrow tables of a whole batch, never a Python object for a row."""
    dataset = _resume(_parquet(task, seed, "arrow"), task, seed, share)
    yield from DataLoader(_Tables(dataset, task), batch_size=None, num_workers=task.workers)


class _Tables(IterableDataset[Batch]):
    """Batches of the files that fall to this loader process."""

    def __init__(self, dataset: Any, task: Task) -> None:
        self.dataset, self.batch_size, self.signals = dataset, task.batch_size, len(task.signals)

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        mine = self.dataset if worker is None else self.dataset.shard(worker.num_workers, worker.id)
        return (_from_table(self.signals, table) for table in mine.iter(self.batch_size))


def _from_table(signals: int, table: Any) -> Batch:
    columns = {name: table[name].combine_chunks() for name in table.column_names}

    def flat(name: str) -> np.ndarray:
        return columns[name].flatten().to_numpy()

    samples = Samples(
        head=np.stack([columns[name].to_numpy() for name in ("user", "event", "label")], axis=1),
        lengths=np.diff(columns["kinds"].offsets.to_numpy()),
        input_ids=flat("input_ids"),
        kinds=flat("kinds"),
        event_ids=flat("event_ids"),
        signals=flat("signals"),
    )
    return to_batch(samples, signals)


def _resume(dataset: Any, task: Task, seed: int, share: float) -> Any:
    if share:
        dataset.load_state_dict(json.loads(task.state_file(seed).read_text()))
    return dataset


def write_state(task: Task, seed: int, share: float) -> None:
    """What `datasets` would have saved at `share` of the epoch `seed`: found only by going there."""
    rows = task.contestant == "datasets, rows"
    dataset = _parquet(task, seed, "numpy" if rows else "arrow")
    count = task.position(share) // (1 if rows else task.batch_size)
    for _ in zip(range(count), dataset if rows else dataset.iter(task.batch_size), strict=False):
        pass
    task.state_file(seed).write_text(json.dumps(dataset.state_dict()))


CONTESTANTS: dict[str, tuple[Open, str | None]] = {
    OURS: (open_ours, None),
    "mosaicml-streaming": (open_mosaic, "mosaicml-streaming"),
    "datasets, rows": (open_rows, "datasets"),
    "datasets, tables": (open_tables, "datasets"),
}
