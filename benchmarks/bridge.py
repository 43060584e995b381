"""A training step of a small decoder that reads long histories by chunks of sinks, beside dense CTR-Sink and DIN at each length.

Each in a fresh process: forward, backward and AdamW, everything trained. `bridge`: bare sinks, `model.sparse`. `ctr-sink, bare`:
the same sequences, all sinks seen. `ctr-sink`: behaviours with their texts. Both with the same backend and no inter-sink bias.
`din`: the same behaviours without text. Memory is what the steps need on top of model and batch. CPU seconds are those of the
process, which other load on the machine changes less. A contestant that would go beyond `--memory-gib` is stopped, and said so.
"""

import argparse
import sys
from typing import Any

from benchmarks import growth
from benchmarks.shapes import SHAPES

CONTESTANTS = ("bridge", "ctr-sink, bare", "ctr-sink", "din")
_COLUMNS = {
    "history": "behaviours", "contestant": "contestant", "rows": "rows", "gflops": "GFLOPs/step", "s_per_step": "s/step",
    "cpu_s_per_step": "CPU s/step", "peak_gib": "peak GiB", "time_ratio": "time / bridge", "cpu_ratio": "CPU / bridge",
    "memory_ratio": "memory / bridge",
}  # fmt: skip


def main() -> int:
    """Run the benchmark; returns the exit code."""
    return growth.main("bridge", _arguments(), measure, _COLUMNS, ours="bridge")


def _arguments() -> argparse.Namespace:
    parser = growth.arguments("bridge", __doc__, CONTESTANTS, [50, 200, 1000, 4000], memory_gib=12.0)
    parser.add_argument("--shape", choices=list(SHAPES), default="tiny")
    parser.add_argument(
        "--attention", choices=["blocks", "sdpa"], default="blocks", help="of the decoders (default: %(default)s)"
    )
    parser.add_argument("--event-tokens", type=int, default=9, help="of a behaviour, its sink not counted (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=2, help="sequences of a step (default: %(default)s)")
    parser.add_argument("--chunks", type=int, default=16)
    parser.add_argument("--transition", type=int, default=2)
    parser.add_argument("--window", type=int, default=64)
    return parser.parse_args()


def measure(args: argparse.Namespace, name: str, history: int) -> dict[str, Any]:
    """Rows, FLOPs, time per step and peak memory of one contestant, in this process."""
    import torch

    from benchmarks.bridge_contestants import FACTS, batch_of, contestant
    from benchmarks.training import Trainee
    from ctrsink.config.stages import Objective
    from ctrsink.families.parameters import set_trainable
    from ctrsink.families.registry import family_of

    torch.set_num_threads(args.threads)
    sparse = {"chunks": args.chunks, "transition": args.transition, "window": args.window}
    found = contestant(name, history, args.shape, args.attention, sparse)
    model = family_of(found.spec.family).build(found.spec, FACTS, 0)
    set_trainable(model, found.groups)
    batch, trainee = batch_of(found, args.batch_size, args.event_tokens), Trainee(model, Objective())
    told = {"rows": batch.tokens, "gflops": model.flop_count(Objective())(batch).total / 1e9}
    return told | growth.measured(lambda: trainee.step([batch]), args.steps, args.memory_gib)


if __name__ == "__main__":
    sys.exit(main())
