"""What the processes of test_tables do: `python -m tests.tables_ranks RANK WORLD STORE FOLDER`; prints a JSON line per run.

Also the runs themselves, for one process.
"""

import json
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from ctrsink.dist import Topology, all_sum
from ctrsink.tables.embedding import ShardedEmbedding, tables_of
from ctrsink.tables.files import save_tables

WIDTH, STEPS, LR = 4, 4, 0.1
DIVISOR = 24.0
"""Sequences of a step, by which a trainer would divide."""


class Run(NamedTuple):
    """A table, how many of its ids are in use, and how a global batch of 24 sequences is cut into micro-batches."""

    rows: int
    ids: int
    micro_batches: tuple[int, ...]
    """Sequences of each, of all ranks; dealt out to ranks in turn, with empty ones where they do not come out even."""


RUNS = {
    "one": Run(50, 60, (24,)),
    "even": Run(50, 60, (4,) * 6),
    "uneven": Run(50, 60, (1, 2, 3, 7, 11)),
    "few rows": Run(2, 3, (8, 8, 8)),
}


class Model(torch.nn.Module):
    """Two lookups in one table, and one in another, as behaviours and targets share and do not."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            self.ids = torch.nn.ModuleDict({name: ShardedEmbedding(run.rows, WIDTH, 0.5) for name in ("item", "user")})

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """int64 [n, 3] -> the sum of losses of n sequences."""
        item, user = self.ids["item"], self.ids["user"]
        return (item(ids[:, :2]).sum(1) * user(ids[:, 2])).sum(1).tanh().sum() + item(ids[:, 0]).square().sum()


def batches(run: Run, step: int) -> list[torch.Tensor]:
    """The micro-batches of a step, int64 [n, 3] each: many repeats, unknown ids, and ids that share rows."""
    whole = torch.randint(-1, run.ids, (24, 3), generator=torch.Generator().manual_seed(step))
    return list(whole.split(list(run.micro_batches)))


def trained(run: Run, topology: Topology) -> Iterator[tuple[Model, float]]:
    """The model and the norm of its gradient after each step."""
    model = Model(run)
    tables = tables_of(model).values()
    for table in tables:
        table.place(topology)
    for step in range(STEPS):
        own = batches(run, step)[topology.rank :: topology.world]
        most = -(-len(run.micro_batches) // topology.world)
        for ids in own + [torch.zeros(0, 3, dtype=torch.int64)] * (most - len(own)):
            (model(ids) * topology.world).backward()
        for table in tables:
            table.collect(DIVISOR * topology.world)
        norm = all_sum([sum(table.squared_norm() for table in tables)], topology)[0] ** 0.5
        for table in tables:
            table.step(LR, 0.5)
        yield model, norm


def results(topology: Topology, folder: Path) -> Iterator[dict[str, Any]]:
    """Train all runs, each saved below `folder`."""
    for name, run in RUNS.items():
        *norms, (model, last) = [step if n == STEPS - 1 else step[1] for n, step in enumerate(trained(run, topology))]
        tables = tables_of(model)
        entries = save_tables(tables, str(folder / name))
        yield {"name": name, "norms": [*norms, last], "entries": entries}


def main(rank: int, world: int, store: str, folder: Path) -> None:
    limit = timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=limit)
    for line in results(Topology(rank, world), folder):
        print(json.dumps(line), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
