"""What the processes of test_native do: `python -m tests.native_ranks save|load RANK WORLD STORE FOLDER`; prints JSON lines."""

import json
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

SAVED = (3, 2)
"""ZeRO stages that two ranks save under."""
LOADED = ((3, 3), (3, 2), (3, 1), (3, 0), (2, 3), (2, 2))
"""Pairs of ZeRO stages, saved under and loaded under by one rank."""
FIRST_STEPS, STEPS = 2, 3


def tree(zero: int, workers: int) -> dict[str, Any]:
    from tests.runs import run_tree

    model = {"backbone": {"config": {"attention_dropout": 0.0}}}
    runtime = {"kind": "ray" if workers > 1 else "local", "workers": workers}
    return run_tree("unused", "unused", model=model, train={"zero_stage": zero}, runtime=runtime)


class Ranks:
    """Engines of this rank over two random batches, which two ranks share and one rank has alone."""

    def __init__(self, rank: int, world: int) -> None:
        from ctrsink.dist import Topology
        from tests.builders import layout_of, random_batch

        self.topology = Topology(rank, world)
        batches = [random_batch(seed, layout_of(), (4, 5)) for seed in (1, 2)]
        self.impressions = sum(b.impressions for b in batches)
        self.batches = batches[rank::world]

    def engine(self, zero: int, stage: int, parameters: dict[str, torch.Tensor], state: Any = None) -> Any:
        from ctrsink.config import parse_run
        from ctrsink.families.decoder.build import build_model
        from ctrsink.families.parameters import load_parameters
        from ctrsink.train.engine import Engine

        spec = parse_run(tree(zero, self.topology.world), "test")
        model = build_model(spec.model, 97, 1)
        load_parameters(model, parameters)
        self.stage = spec.stages[stage]
        return Engine(model.train(), spec, self.stage, self.topology, state)

    def steps(self, engine: Any, count: int) -> list[float]:
        return [engine.step(self.batches, self.impressions, self.stage, 1.0).loss for _ in range(count)]

    def restored(self, run_dir: str, zero: int) -> tuple[Any, Any]:
        from ctrsink.train.checkpoint.native import load_native, restore

        found = restore(run_dir, zero, self.topology)
        assert found is not None
        checkpoint, shards = found
        assert shards is not None
        engine = self.engine(zero, 1, checkpoint.parameters)
        load_native(engine, shards)
        return checkpoint, engine


def same_state(state: Any, path: str) -> bool:
    """Whether an engine's state is that of the portable checkpoint of the same moment, to the bit."""
    from ctrsink.train.checkpoint.checkpoint import find_checkpoint

    expected = find_checkpoint(path)
    pairs = [(state.moments, expected.moments), (state.parameters, {n: expected.parameters[n] for n in state.parameters})]
    return state.steps == expected.steps and all(
        a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) for a, b in pairs
    )


def save(ranks: Ranks, folder: Path) -> Iterator[dict[str, Any]]:
    """Two stages, so that step counts differ by group; two checkpoints, native and portable; the losses behind the first."""
    from ctrsink.train.checkpoint.checkpoint import Checkpoint, save_checkpoint
    from ctrsink.train.checkpoint.native import save_native

    for zero in SAVED:
        first = ranks.engine(zero, 0, {})
        ranks.steps(first, FIRST_STEPS)
        state = first.state()
        first.destroy()
        engine = ranks.engine(zero, 1, state.parameters, state)
        losses = ranks.steps(engine, STEPS)
        for step in (FIRST_STEPS + STEPS, FIRST_STEPS + STEPS + 1):
            state = engine.state()
            given = (step, 8 * step, {}, {}, state.steps, "0" * 64)
            save_native(engine, str(folder / f"zero{zero}"), Checkpoint(*given))
            if ranks.topology.is_first:
                run = folder / f"zero{zero}-portable-{step}"
                save_checkpoint(str(run), Checkpoint(step, 8 * step, state.parameters, state.moments, state.steps, "0" * 64))
            losses += ranks.steps(engine, 1)
        yield {"zero": zero, "losses": losses, "steps": state.steps, "error": failed_save(ranks, engine, folder / f"zero{zero}")}
        engine.destroy()
        _, again = ranks.restored(str(folder / f"zero{zero}"), zero)
        equal = same_state(again.state(), str(folder / f"zero{zero}-portable-6"))
        yield {"zero": zero, "equal": equal, "losses": ranks.steps(again, 1)}
        again.destroy()
    _, again = ranks.restored(str(folder / "zero3"), 2)
    yield {"zero": 2, "equal": same_state(again.state(), str(folder / "zero3-portable-6")), "losses": ranks.steps(again, 1)}
    again.destroy()


def failed_save(ranks: Ranks, engine: Any, run: Path) -> str:
    """What is raised where one rank, the second, has a full disk."""
    from ctrsink import storage
    from ctrsink.errors import RunError
    from ctrsink.train.checkpoint.checkpoint import Checkpoint
    from ctrsink.train.checkpoint.native import save_native

    def full(source: object, uri: str) -> None:
        raise RunError(f"{uri}: no space left on device")

    upload = storage.upload_dir
    if not ranks.topology.is_first:
        storage.upload_dir = full
    try:
        save_native(engine, str(run), Checkpoint(7, 56, {}, {}, {}, "0" * 64))
    except RunError as error:
        return str(error)
    finally:
        storage.upload_dir = upload
    return ""


def load(ranks: Ranks, folder: Path) -> Iterator[dict[str, Any]]:
    """By one rank, of what two saved."""
    for saved, zero in LOADED:
        checkpoint, engine = ranks.restored(str(folder / f"zero{saved}"), zero)
        equal = same_state(engine.state(), str(folder / f"zero{saved}-portable-{checkpoint.step}"))
        yield {"saved": saved, "zero": zero, "step": checkpoint.step, "equal": equal, "losses": ranks.steps(engine, 1)}
        engine.destroy()


def main(what: str, rank: int, world: int, store: str, folder: Path) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    from ctrsink.runtime.process import prepare_process

    prepare_process("cpu", 1, rank)
    logging.getLogger("ctrsink").setLevel(logging.WARNING)
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    for line in {"save": save, "load": load}[what](Ranks(rank, world), folder):
        print(json.dumps(line), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], Path(sys.argv[5]))
