"""The whole of training in one readable program, one process and no frameworks around: load, build, step, save.

`python launchers/one_process.py --config FILE --to model.safetensors [section.key=value ...]` trains all stages of a run on the
CPU with the losses of `ctrsink train` on one worker under ZeRO 0, but without Ray, DeepSpeed, checkpoints and evaluation, and so
without stages that a plateau ends. For reading, and for a debugger.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from ctrsink.config import RunSpec, load_run
from ctrsink.config.stages import StageSpec
from ctrsink.dataset.manifest import read_manifest
from ctrsink.dataset.reader import Dataset
from ctrsink.errors import InputError
from ctrsink.families.parameters import set_trainable
from ctrsink.families.protocol import CTRModule
from ctrsink.families.registry import family_of, source_of
from ctrsink.features.mix64 import mix64
from ctrsink.prepare.tokenize import load_tokenizer
from ctrsink.stream.stream import TrainStream
from ctrsink.train.stages import StageController


def main() -> int:
    """Train the run of a configuration; returns the exit code."""
    parser = argparse.ArgumentParser("python launchers/one_process.py", description=__doc__)
    parser.add_argument("--config", required=True)
    parser.add_argument("--to", required=True, help="safetensors file for the trained weights")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_args()
    try:
        for line in train(load_run(args.config, args.overrides), args.to):
            print(line)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def train(spec: RunSpec, to: str) -> Iterator[str]:
    """Train and save; yields a line for each step.

    Raises:
        InputError: the data set does not fit, or the run asks for what is left out here.
    """
    if spec.train.precision == "auto" or spec.train.micro_batch_tokens == "auto" or any(s.plateau for s in spec.stages):
        raise InputError("one_process.py knows neither train.precision auto, train.micro_batch_tokens auto nor plateau")
    family, manifest = family_of(spec.model.family), read_manifest(spec.data.uri)
    facts = family.check(spec, manifest, lambda: len(load_tokenizer(spec.data.uri)))
    source = source_of(Dataset.of(spec.data), "train", family.layout(spec.data, spec.model, manifest))
    model = family.build(spec.model, facts, spec.seed, spec.train.precision).train()
    controller, position, states = StageController(spec, sum(source.per_shard)), 0, {}
    while not controller.finished:
        controller.advance()
        stage, data, size = controller.stage, spec.data, spec.batch_size(controller.stage)
        optimizer = optimizer_of(model, spec, stage, states)
        accumulation, tokens = spec.accumulation(stage, 1), spec.train.micro_batch_tokens
        stream = TrainStream(
            source, spec.seed, data.shuffle_shards, size, accumulation, 0, 1, data.order, data.workers, tokens
        )  # fmt: skip
        stream.load_state_dict({"position": position})
        for step in stream:
            key = np.array([controller.step])
            torch.manual_seed(int(mix64(key, spec.seed, 0)[0] >> 1))  # dropout, as in ctrsink.train.loop
            batches = [model.drawn(batch, stage.learns, int(mix64(key, spec.seed)[0] >> 1)) for batch in step.micro_batches]
            units = step.impressions if stage.objective == "click" else max(1, sum(batch.units or 0 for batch in batches))
            optimizer.zero_grad()
            total = 0.0
            for batch in batches:
                loss = model(batch, stage.learns).loss / units
                loss.backward()
                total += float(loss.detach())
            torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], spec.train.clip_norm)
            for group in optimizer.param_groups:
                group["lr"] = stage.lr[group["group"]] * controller.factor()
            optimizer.step()
            controller.after_step()
            yield f"step {controller.step} stage {stage.name} loss {total:.6f}"
            if controller.ended:
                break
        position = stream.position
        states |= optimizer.state
    save_file({name: value.detach().contiguous() for name, value in model.state_dict().items()}, Path(to))


def optimizer_of(model: CTRModule, spec: RunSpec, stage: StageSpec, states: dict[Any, Any]) -> torch.optim.AdamW:
    """AdamW over what the stage trains; moments of what the stage before trained, too, go on."""
    set_trainable(model, stage.trainable)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    groups = [
        {"params": [p], "group": model.trained_as(name, stage.trainable), "lr": 0.0}
        | {"weight_decay": spec.train.weight_decay if model.decays(name, p.dim()) else 0.0}
        for name, p in trained.items()
    ]
    optimizer = torch.optim.AdamW(groups, betas=spec.train.betas, eps=1e-8)
    optimizer.state.update({p: states[p] for p in trained.values() if p in states})
    return optimizer


if __name__ == "__main__":
    raise SystemExit(main())
