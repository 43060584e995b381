"""How forward and backward through SparseCTR's blocks grow with the history, beside dense attention with the same bias.

Each in a fresh process. `sparse`: as the family computes it. `dense`: the same blocks with torch's SDPA over all that lies before
and the same time bias, in place of the three branches. Memory is what the steps need on top of model and batch. CPU seconds are
those of the process, which other load on the machine changes less. A contestant that would go beyond `--memory-gib` is stopped,
and said to be.
"""

import argparse
import sys
from typing import Any

from benchmarks import growth

CONTESTANTS = ("sparse", "dense")
_COLUMNS = {
    "history": "behaviours", "contestant": "contestant", "s_per_step": "s/step", "cpu_s_per_step": "CPU s/step",
    "peak_gib": "peak GiB", "time_ratio": "time / sparse", "cpu_ratio": "CPU / sparse", "memory_ratio": "memory / sparse",
}  # fmt: skip


def main() -> int:
    """Run the benchmark; returns the exit code."""
    return growth.main("sparse_length", _arguments(), measure, _COLUMNS, ours="sparse")


def _arguments() -> argparse.Namespace:
    parser = growth.arguments("sparse_length", __doc__, CONTESTANTS, [128, 512, 2048, 8192], memory_gib=12.0)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--blocks", type=int, default=1, help="layers (default: %(default)s)")
    parser.add_argument("--chunks", type=int, default=16)
    parser.add_argument("--transition", type=int, default=2)
    parser.add_argument("--window", type=int, default=64)
    return parser.parse_args()


def measure(args: argparse.Namespace, contestant: str, history: int) -> dict[str, Any]:
    """Time per step and peak memory of one contestant, in this process."""
    import torch

    from benchmarks.sparse_dense import FullAttention, spec_of, stack_of

    torch.set_num_threads(args.threads)
    spec = spec_of(args.width, args.heads, args.blocks, args.chunks, args.transition, args.window)
    blocks, rows, profiles, seen = stack_of(spec, history)
    if contestant == "dense":
        for block in blocks:
            block.attention = FullAttention(block.attention)  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]

    def step() -> None:
        blocks.zero_grad()
        out = rows
        for block in blocks:
            out = block(out, profiles, seen)
        out.square().sum().backward()

    return growth.measured(step, args.steps, args.memory_gib)


if __name__ == "__main__":
    sys.exit(main())
