"""What the processes of test_zero3 do: `python -m tests.zero3_ranks RANK WORLD STORE DATA FOLDER`; a JSON line per case."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

BACKBONE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
"""Matrices large enough to be held in parts, see ctrsink.train.parts."""
CUTS = (5, 9)
"""Steps after which a run is left and taken up again: in the second stage, and in the third."""
STEPS = 11


def tree(data: str, run_dir: str, world: int, model: dict[str, Any] | None = None, **train: Any) -> dict[str, Any]:
    """A run of three stages: the last one trains what the first did, and leaves alone what the second did."""
    from tests.runs import run_tree

    small, everything = ["sink", "bias", "head"], ["sink", "bias", "head", "backbone"]
    rates = dict.fromkeys([*everything, "lora"], 0.01)
    found = run_tree(
        data,
        run_dir,
        model={"backbone": {"config": BACKBONE | {"attention_dropout": 0.0}}},
        train={"zero_stage": 3, "micro_batch_size": 4 // world, **train},
        runtime={"kind": "ray" if world > 1 else "local", "workers": world},
    )
    stages = (("align", small, 4), ("full", everything, 3), ("again", small, 4))
    found["stages"] = [{"name": name, "trainable": groups, "lr": rates, "steps": steps} for name, groups, steps in stages]
    found["model"] |= model or {}
    return found


class Ranks:
    """What this rank does with the others."""

    def __init__(self, rank: int, world: int, data: str, folder: str) -> None:
        from ctrsink.dist import Topology

        self.topology, self.data, self.folder = Topology(rank, world), data, Path(folder)

    def cases(self) -> Iterator[dict[str, Any]]:
        pretrained = {"backbone": {"path": str(self.folder / "pretrained")}}
        for precision in ("fp32", "bf16"):
            yield {"case": f"random {precision}"} | self.built(precision, {})
            yield {"case": f"lora {precision}"} | self.built(precision, {"lora": {"rank": 2}})
            yield {"case": f"pretrained {precision}"} | self.built(precision, pretrained)
        yield {"case": "large"} | self.large()
        for name, zero, cuts in (("zero2", 2, ()), ("zero3", 3, ()), ("cut", 3, CUTS)):
            yield {"case": name} | self.trained(name, cuts, zero_stage=zero)
        for name, cuts in (("narrow", ()), ("narrow cut", CUTS)):
            yield {"case": name} | self.trained(name, cuts, precision="bf16", weights="bf16")
        from ctrsink.train.checkpoint import saving

        saving.AT_ONCE = 0
        yield {"case": "gathered"} | self.trained("gathered", CUTS)
        yield {"case": "native"} | self.trained("native", CUTS, checkpoint_format="native")

    def built(self, precision: str, model: dict[str, Any]) -> dict[str, Any]:
        """Whether a sharded model has the values of one that is built whole, to the bit, and a rank holds its part alone."""
        import deepspeed

        from ctrsink.config import parse_run
        from ctrsink.config.model import DecoderSpec
        from ctrsink.families.decoder.build import build_model
        from ctrsink.families.facts import Facts
        from ctrsink.families.parameters import load_parameters, set_trainable
        from ctrsink.train.built import built

        spec = parse_run(tree(self.data, "unused", self.topology.world, model), "test")
        assert isinstance(spec.model, DecoderSpec)
        whole = build_model(spec.model, 300, spec.seed, precision)
        trained = {"backbone.norm.weight": torch.full((64,), 0.1)}
        if "lora" not in model:
            trained["backbone.layers.0.mlp.up_proj.weight"] = torch.linspace(-1, 1, 96 * 64).view(96, 64)
        load_parameters(whole, trained)
        set_trainable(whole, spec.stages[1].trainable)
        sharded = built(spec, spec.stages[1], Facts(300), self.topology, precision, trained)
        parts = {name: p.ds_tensor.numel() == -(-p.ds_numel // self.topology.world) for name, p in sharded.named_parameters()}  # pyright: ignore[reportAttributeAccessIssue]
        wrong = []
        for (name, expected), (other, found) in zip(whole.named_parameters(), sharded.named_parameters(), strict=True):
            with deepspeed.zero.GatheredParameters([found]):
                same = name == other and found.dtype == expected.dtype and torch.equal(found.data, expected.data)
                if not same or found.requires_grad != expected.requires_grad:
                    wrong.append(name)
        given = all(value.untyped_storage().nbytes() == value.nbytes for value in trained.values())
        buffers = all(torch.equal(a, b) for a, b in zip(whole.buffers(), sharded.buffers(), strict=True))
        return {"wrong": wrong, "buffers": buffers and given, "parts": all(parts.values()), "count": len(parts)}

    def large(self) -> dict[str, Any]:
        """What the kernel counts at most while 25 million numbers are built, in MiB, and what they take."""
        from benchmarks.zero3_memory import MIB, resident
        from ctrsink.config import parse_run
        from ctrsink.families.facts import Facts
        from ctrsink.train.built import built

        sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6}
        spec = parse_run(tree(self.data, "unused", self.topology.world), "test")
        config = {**spec.model.backbone.config, **sizes}  # pyright: ignore[reportAttributeAccessIssue, reportGeneralTypeIssues]
        large = parse_run(tree(self.data, "unused", self.topology.world, {"backbone": {"config": config}}), "test")
        before = resident("VmRSS", reset=True)
        model = built(large, large.stages[0], Facts(300), self.topology, "fp32", {})
        peak = resident("VmHWM") - before
        sizes = [(p.ds_tensor.nbytes, 4 * p.ds_numel) for p in model.parameters()]  # pyright: ignore[reportAttributeAccessIssue]
        share, largest = sum(own for own, _ in sizes), max(whole for _, whole in sizes)
        return {"peak": peak / MIB, "share": share / MIB, "largest": largest / MIB}

    def trained(self, name: str, cuts: tuple[int, ...], **train: Any) -> dict[str, Any]:
        """A run, left and taken up again after the steps in `cuts`."""
        from ctrsink.config import parse_run
        from ctrsink.runtime import preflight
        from ctrsink.train.loop import Trainer

        spec = parse_run(tree(self.data, str(self.folder / name), self.topology.world, **train), "test")
        facts = preflight.check(spec)
        done = 0
        for cut in cuts:
            Trainer(spec, self.topology, facts).run(stop_after=cut - done)
            done = cut
        result = Trainer(spec, self.topology, facts).run()
        return {key: result[key] for key in ("steps", "finished", "checksum", "evaluation")}


def main(rank: int, world: int, store: str, data: str, folder: str) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    from ctrsink.runtime.process import prepare_process

    prepare_process("cpu", 1, 1)
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    for line in Ranks(rank, world, data, folder).cases():
        print(json.dumps(line), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:6])
