"""What the benchmarks of training share: a run made of configs/, a model with its optimiser, and steps against the clock."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml

from benchmarks.raw import CONFIGS
from ctrsink import storage
from ctrsink.config import RunSpec, load_run
from ctrsink.config.stages import Objective
from ctrsink.dataset.manifest import MANIFEST_NAME
from ctrsink.dataset.reader import Dataset
from ctrsink.errors import InputError
from ctrsink.families.facts import Facts
from ctrsink.families.parameters import set_trainable
from ctrsink.families.registry import family_of, source_of
from ctrsink.prepare.build import prepare
from ctrsink.sequences.batch import Batch
from ctrsink.stream.stream import Step, TrainStream


@dataclass(frozen=True)
class Work:
    """What some steps did, and how long they took."""

    steps: int
    impressions: int
    tokens: int
    """Rows that the cost of a sequence is counted in: positions of text."""
    seconds: float


class Trainee:
    """A model that takes training steps on one device with AdamW; neither Ray nor DeepSpeed.

    Args:
        model: called as a CTRModule is; what requires a gradient is trained.
        objective: what it trains for.
        device: what it computes on.
        clip_norm: largest norm of the gradient.
    """

    def __init__(self, model: torch.nn.Module, objective: Objective, device: str = "cpu", clip_norm: float = 1.0) -> None:
        self.model, self.objective, self.device, self.clip_norm = model.to(device).train(), objective, device, clip_norm
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4)

    def step(self, batches: Sequence[Batch]) -> None:
        """Forward and backward of each micro-batch, clipping, AdamW; done when it returns."""
        impressions = sum(batch.impressions for batch in batches)
        for batch in batches:
            loss = self.model(batch.to(self.device), self.objective).loss
            (loss / impressions).backward()
        torch.nn.utils.clip_grad_norm_(self.trained, self.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.device != "cpu":
            torch.cuda.synchronize()


def trainee_of(spec: RunSpec, facts: Facts) -> Trainee:
    """What the run trains in its last stage, on the CPU."""
    stage = spec.stages[-1]
    model = family_of(spec.model.family).build(spec.model, facts, spec.seed, spec.train.precision)
    set_trainable(model, stage.trainable)
    return Trainee(model, stage.learns, clip_norm=spec.train.clip_norm)


def run_of(folder: Path, name: str, fragments: Sequence[str], sections: dict[str, Any], overrides: Sequence[str] = ()) -> RunSpec:
    """The run of some files below configs/ with `sections` over them; its configuration is kept as `folder/name.yaml`.

    Raises:
        InputError: they do not go together.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tree = {"include": [str(CONFIGS / fragment) for fragment in fragments], "run_dir": str(folder / name)}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps(tree | sections))))
    return load_run(str(path), list(overrides))


def prepare_once(spec: RunSpec) -> str:
    """Prepare the run's log unless its folder holds what an earlier benchmark prepared in the same way; returns that folder.

    Raises:
        InputError: the log cannot be used, or the folder holds something else.
    """
    assert spec.prepare is not None
    uri, wanted = spec.data.uri, spec.prepare.model_dump_json()
    note = storage.join(uri, "benchmark-prepare.json")
    if storage.exists(storage.join(uri, MANIFEST_NAME)):
        if not storage.exists(note) or storage.read_bytes(note).decode() != wanted:
            raise InputError(f"{uri} holds data prepared from something else: choose another --work, or delete it")
        return uri
    prepare(spec.prepare, uri)
    storage.write_bytes(note, wanted.encode())
    return uri


def stream_of(spec: RunSpec, rank: int = 0, world: int = 1) -> Iterator[Step]:
    """The steps of the run as training reads them."""
    dataset = Dataset(spec.data.uri, 2 * spec.data.shuffle_shards)
    layout = family_of(spec.model.family).layout(spec.data, spec.model, dataset.manifest)
    source = source_of(dataset, "train", layout)
    train = spec.train
    accumulation, tokens = spec.accumulation(spec.stages[-1], world), train.micro_batch_tokens
    assert tokens != "auto"
    return iter(
        TrainStream(source, spec.seed, spec.data.shuffle_shards, train.batch_size, accumulation, rank, world, tokens=tokens)
    )


def work_for(
    step: Callable[[Step], object],
    steps: Iterator[Step],
    seconds: float,
    least: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> Work:
    """Take steps until `seconds` have passed on the clock, `least` of them at any rate; waiting for the data counts."""
    count = impressions = tokens = 0
    began = now = clock()
    while now - began < seconds or count < least:
        taken = next(steps)
        step(taken)
        count += 1
        impressions += taken.impressions
        tokens += sum(batch.tokens for batch in taken.micro_batches)
        now = clock()
    return Work(count, impressions, tokens, now - began)


def rates(rounds: Sequence[Work]) -> dict[str, Any]:
    """Median over the rounds of one contestant, the slowest and the fastest, and how many steps they made."""
    found = sorted(work.impressions / work.seconds for work in rounds)
    return {
        "impressions_per_s": median(found),
        "slowest": found[0],
        "fastest": found[-1],
        "tokens_per_s": median(work.tokens / work.seconds for work in rounds),
        "s_per_step": median(work.seconds / work.steps for work in rounds),
        "steps": sum(work.steps for work in rounds),
        "rounds": [asdict(work) for work in rounds],
    }
