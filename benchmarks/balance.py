"""Ranks that wait for one another: the spread of FLOPs per rank, and what it makes of a step's time, on real lengths.

    python -m benchmarks.balance --data runs/data/ml-1m

The sequences of steps are built from a prepared data set, and the model's FLOPs of each are counted as training counts them. Then
they are shared out over ranks: by number, in the order of their lengths (`striped`), and by what they cost (`dealt`), which
`ctrsink.stream.order.deal` foresees from counts of events alone. Nothing is trained: a step's time is told in units of one whose
ranks have all equally much, if time followed FLOPs. Where gradients travel in each micro-step (ZeRO 2 and 3) that is the sum over
micro-steps of the rank with most; where they travel once (ZeRO 0 and 1) it is the rank with most of all. Each is dealt as
training under such a ZeRO stage deals it.
"""

import argparse
from functools import partial
from typing import Any

import numpy as np

from benchmarks.report import machine, machine_line, markdown
from benchmarks.shapes import SHAPES, TRAINED, VOCABULARY, random_spec, shape_of
from ctrsink import strict_json
from ctrsink.config.data import DataSpec
from ctrsink.config.stages import Objective
from ctrsink.dataset.reader import Dataset
from ctrsink.families.decoder.build import build_model
from ctrsink.families.parameters import set_trainable
from ctrsink.families.protocol import CTRModule
from ctrsink.families.registry import family_of, source_of
from ctrsink.stream.budget import fill
from ctrsink.stream.order import Order, deal, dealt_in_rows
from ctrsink.stream.stream import SequenceSource
from ctrsink.train.balance import price_of

AT_ONCE = 64  # sequences that are built together
FORMS: dict[str, dict[str, Any]] = {
    "per_target, history 50": {"examples": "per_target", "history": 50},
    "per_target, history 1000": {"examples": "per_target", "history": 1000},
    "per_user, 32 targets, history 50": {"examples": "per_user", "history": 50, "targets": 32},
    "per_user, whole chronologies": {"examples": "per_user", "history": 0, "targets": 5000},
}


def main(argv: list[str] | None = None) -> int:
    """Print the table, or one JSON object."""
    parser = argparse.ArgumentParser("python -m benchmarks.balance", description=__doc__)
    parser.add_argument("--data", required=True, help="prepared data set")
    parser.add_argument("--shape", choices=SHAPES, default="smollm2")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 8, 64])
    parser.add_argument("--micro-batch", type=int, default=4, help="sequences")
    parser.add_argument("--accumulation", type=int, default=4, help="micro-batches of a rank in a step")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    found = machine()
    rows = [row for form in args.forms for row in measured(args, form)]
    if args.json:
        print(strict_json.dumps({"machine": found, "rows": rows}))
        return 0
    print(machine_line(found), "\n")
    columns = {
        "form": "sequences", "ranks": "ranks", "by": "micro-batches",
        "once/striped": "ZeRO 0-1, striped", "once/dealt": "dealt", "once/gain": "gain",
        "each/striped": "ZeRO 2-3, striped", "each/dealt": "dealt", "each/gain": "gain",
    }  # fmt: skip
    print(markdown(list(columns.values()), [[row[key] for key in columns] for row in rows]))
    return 0


def measured(args: argparse.Namespace, form: str) -> list[dict[str, Any]]:
    """Rows of one form of sequences: each number of ranks, by number of sequences and by tokens."""
    data = DataSpec(uri=args.data, **FORMS[form])
    spec = random_spec(shape_of(args.shape), True, 0.5)
    model = build_model(spec, VOCABULARY, 0)
    set_trainable(model, TRAINED)
    dataset = Dataset(args.data)
    source = source_of(dataset, "train", family_of("decoder").layout(data, spec, dataset.manifest))
    objective = Objective()
    price = price_of(model, source, objective)
    order = Order(source.per_shard, 0, len(source.per_shard))
    per_rank = args.micro_batch * args.accumulation
    # The same sequences for all numbers of ranks: the steps of many ranks are those of few, joined.
    ids = order.ids(0, args.steps * max(args.ranks) * per_rank)
    flops, tokens = counted(model, source, objective, ids)
    budget = int(tokens.mean() * args.micro_batch)
    rows = []
    for ranks in args.ranks:
        size = ranks * per_rank
        steps = [slice(first, first + size) for first in range(0, len(ids), size)][: args.steps]
        for by, most, groups in (
            (f"{args.micro_batch} sequences", None, args.accumulation),
            (f"{budget:,} tokens", budget, None),
        ):
            row: dict[str, Any] = {"form": form, "ranks": ranks, "by": by, "pairs": price.pairs}
            for wait, lockstep in (("once", False), ("each", True)):
                deals = ("striped", striped), ("dealt", partial(dealt, lockstep))
                for how, share in deals:
                    sizes = [source.sizes(ids[s]) for s in steps]
                    steps_of = [
                        share(lengths, source.costs(targets, lengths, price), ranks, groups) for targets, lengths in sizes
                    ]
                    times = [waited(own, flops[s], tokens[s], most, lockstep) for own, s in zip(steps_of, steps, strict=True)]
                    row[f"{wait}/{how}"] = float(np.mean(times))
                row[f"{wait}/gain"] = row[f"{wait}/striped"] / row[f"{wait}/dealt"]
            rows.append(row)
    return rows


def counted(model: CTRModule, source: SequenceSource, objective: Objective, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """FLOPs and tokens of each sequence."""
    count, found = model.flop_count(objective), np.empty((len(ids), 2))
    by_shard = np.argsort(ids, kind="stable")  # each shard is read once
    for first in range(0, len(ids), AT_ONCE):
        some = by_shard[first : first + AT_ONCE]
        batches = source.build_all([ids[[place]] for place in some], [None] * len(some))
        found[some] = [(count(batch).total, batch.tokens) for batch in batches]
    return found[:, 0], found[:, 1].astype(np.int64)


def striped(lengths: np.ndarray, costs: np.ndarray, ranks: int, groups: int | None) -> np.ndarray:
    """As many to each rank, the next longest in turn."""
    return np.argsort(-lengths, kind="stable").reshape(groups or 1, -1, ranks).transpose(2, 0, 1)


def dealt(lockstep: bool, lengths: np.ndarray, costs: np.ndarray, ranks: int, groups: int | None) -> np.ndarray:
    """As TrainStream does it; `groups` None: what is filled up to some tokens afterwards."""
    if groups is not None:
        return deal(lengths, costs, ranks, groups, lockstep)
    return dealt_in_rows(lengths, costs, ranks)[:, None] if lockstep else deal(lengths, costs, ranks, 1)


def waited(shares: np.ndarray, flops: np.ndarray, tokens: np.ndarray, budget: int | None, lockstep: bool) -> float:
    """Time of one step [ranks, groups, micro], in units of an even share of its FLOPs."""
    batches = [[group[group >= 0] for group in rank] for rank in shares]
    if budget is not None:
        batches = [[own[group] for group in fill(tokens[own], budget)] for (own,) in batches]
    most = max(map(len, batches))
    fillers = [flops[np.concatenate(rank)].min() for rank in batches]
    loads = np.array(
        [[flops[b].sum() for b in rank] + [f] * (most - len(rank)) for rank, f in zip(batches, fillers, strict=True)]
    )
    time = loads.max(0).sum() if lockstep else loads.sum(1).max()
    return float(time / (flops.sum() / len(shares)))


if __name__ == "__main__":
    raise SystemExit(main())
