"""What the processes of test_sharded do: `python -m tests.sharded_ranks RANK WORLD STORE DATA FOLDER`; a JSON line per run.

Two ranks train runs from the start, one of them on a disk that is full at times; three go on with copies of what two began.
"""

import json
import logging
import os
import sys
from collections.abc import Iterator
from typing import Any

from ctrsink.config.load import merge

ZERO = (0, 2, 3)
STEPS = 8
CUT = 4
"""Step of the checkpoint that other numbers of ranks go on from: in the stage that does not train ids."""


def stages() -> list[dict[str, Any]]:
    """Ids are trained, left alone, and trained again."""
    all_groups = ["ids", "embedding", "model"]
    rates = {"ids": 0.05, "embedding": 0.01, "model": 0.01}
    return [
        {"name": "first", "trainable": all_groups, "lr": rates, "steps": 3},
        {"name": "others", "trainable": all_groups[1:], "lr": rates, "steps": 2},
        {"name": "again", "trainable": all_groups, "lr": rates, "steps": 3},
    ]


def tree(data: str, run_dir: str, name: str = "din", **changes: Any) -> dict[str, Any]:
    """A run of a family with two sharded tables, without what is drawn at random by rank; a rank of two may need more batches."""
    from tests.test_families_runs import tree_of

    users = {"target": ["item_id", "user_id", "hour", "item_mean", "user_res"], "dropout": 0.0, "id_dropout": 0.0}
    found = tree_of(name, data, run_dir, "per_target", model={"id_tables": "sharded", **users})
    train = {"micro_batch_tokens": 20, "checkpoint_every": 2, "clip_norm": 0.1, "validation": {"every": 2, "sequences": 20}}
    return merge(found | {"stages": stages()}, merge({"train": train}, changes))


class Heard(logging.Handler):
    """Warnings of a run."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


class Runs:
    """The runs of this rank."""

    def __init__(self, rank: int, world: int, data: str, folder: str) -> None:
        self.rank, self.world, self.data, self.folder = rank, world, data, folder

    def trained(self, name: str, **changes: Any) -> dict[str, Any]:
        from ctrsink.config import parse_run
        from ctrsink.dist import Topology
        from ctrsink.runtime import preflight
        from ctrsink.train.loop import Trainer

        heard = Heard()
        logging.getLogger("ctrsink.train").addHandler(heard)
        several = {"runtime": {"kind": "ray", "workers": self.world}}
        spec = parse_run(tree(self.data, f"{self.folder}/{name}", **merge(several, changes)), "test")
        result = Trainer(spec, Topology(self.rank, self.world), preflight.check(spec)).run()
        logging.getLogger("ctrsink.train").removeHandler(heard)
        return {"name": name, "warned": heard.messages} | {key: result[key] for key in ("steps", "finished", "impressions")}

    def two(self) -> Iterator[dict[str, Any]]:
        for zero in ZERO:
            yield self.trained(f"zero{zero}", train={"zero_stage": zero})
        yield self.trained("auto", train={"micro_batch_tokens": "auto", "memory_gib": 0.01})
        yield self.trained("full", train={"keep": {"last": 1}})

    def three(self) -> Iterator[dict[str, Any]]:
        for zero in ZERO:
            yield self.trained(f"zero{zero}", train={"zero_stage": zero})
        yield self.trained("damaged")


def fill_disk(rank: int) -> None:
    """The second rank cannot write its rows of steps 4 and 8 of the run `full`, but for a second attempt."""
    from ctrsink import storage
    from ctrsink.errors import RunError

    write, failed = storage.write_bytes, set()

    def full(uri: str, content: Any) -> None:
        step = uri.rpartition("step-")[2].partition("/")[0]
        if "/full/" in uri and "/tables/" in uri and step in ("00000004", "00000008") and step not in failed:
            failed.add(step)
            raise RunError(f"{uri}: no space left on device")
        write(uri, content)

    if rank == 1:
        storage.write_bytes = full


def main(rank: int, world: int, store: str, data: str, folder: str) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    from ctrsink.runtime.process import prepare_process

    prepare_process("cpu", 1, 1)
    import torch.distributed as dist

    fill_disk(rank)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    runs = Runs(rank, world, data, folder)
    for line in runs.two() if world == 2 else runs.three():
        print(json.dumps(line), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:6])
