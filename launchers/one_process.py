"""The whole of training in one readable program, one process and no frameworks around: load, build, step, save.

`python launchers/one_process.py --config FILE --to model.safetensors [section.key=value ...]` trains all stages of a run on the
CPU, as `ctrsink train` does, but without Ray, DeepSpeed, checkpoints and evaluation. For reading, and for a debugger.
"""

import argparse
import sys

import torch
from safetensors.torch import save_file

from ctrsink.config import load_run
from ctrsink.dataset.manifest import read_manifest
from ctrsink.dataset.reader import Dataset
from ctrsink.errors import InputError
from ctrsink.families.parameters import set_trainable
from ctrsink.families.registry import family_of, source_of
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
        train(args.config, args.overrides, args.to)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def train(config: str, overrides: list[str], to: str) -> None:
    """Train and save.

    Raises:
        InputError: the configuration, or its data set, is wrong.
    """
    spec = load_run(config, overrides)
    family, manifest = family_of(spec.model.family), read_manifest(spec.data.uri)
    facts = family.check(spec, manifest, lambda: len(load_tokenizer(spec.data.uri)))
    dataset = Dataset(spec.data.uri)
    source = source_of(dataset, "train", family.layout(spec.data, spec.model, manifest))
    model = family.build(spec.model, facts, spec.seed, spec.train.precision)
    controller, position = StageController(spec, sum(source.per_shard)), 0
    while not controller.finished:
        controller.advance()
        stage = controller.stage
        set_trainable(model, stage.trainable)
        groups = [(name, model.trained_as(name, stage.trainable), p) for name, p in model.named_parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            [{"params": [p], "lr": 0.0, "group": group} for _, group, p in groups], betas=spec.train.betas
        )
        stream = TrainStream(
            source, spec.seed, spec.data.shuffle_shards, spec.batch_size(stage), spec.accumulation(stage, 1), rank=0, world=1
        )
        stream.load_state_dict({"position": position})
        for step in stream:
            for group in optimizer.param_groups:
                group["lr"] = stage.lr[group["group"]] * controller.factor()
            optimizer.zero_grad()
            batches = [model.drawn(batch, stage.learns, controller.step) for batch in step.micro_batches]
            units = sum(batch.units or 0 for batch in batches) or step.impressions
            total = 0.0
            for batch in batches:
                loss = model.train()(batch, stage.learns).loss / units
                loss.backward()
                total += float(loss.detach())
            torch.nn.utils.clip_grad_norm_([p for _, _, p in groups], spec.train.clip_norm)
            optimizer.step()
            controller.after_step()
            print(f"step {controller.step} stage {stage.name} loss {total:.4f}")
            if controller.ended:
                break
        position = stream.position
    save_file({name: value.detach().contiguous() for name, value in model.state_dict().items()}, to)


if __name__ == "__main__":
    raise SystemExit(main())
