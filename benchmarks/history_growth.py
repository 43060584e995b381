"""How a training step's time and memory grow with the history: ours beside the bias as a dense mask, each in a fresh process.

Memory is what the steps need on top of the built model. A contestant that would go beyond `--memory-gib` is stopped, and said
to be.
"""

import argparse
import sys
from typing import Any

from benchmarks import growth
from benchmarks.shapes import SHAPES, VOCABULARY, random_batch, random_spec, shape_of, trained_groups

CONTESTANTS = ("ours", "dense")
_COLUMNS = {
    "history": "behaviours", "positions": "positions", "contestant": "contestant", "s_per_step": "s/step", "peak_gib": "peak GiB",
}  # fmt: skip


def main() -> int:
    """Run the benchmark; returns the exit code."""
    return growth.main("history_growth", _arguments(), measure, _COLUMNS)


def _arguments() -> argparse.Namespace:
    parser = growth.arguments("history_growth", __doc__, CONTESTANTS, [10, 50, 200, 1000], memory_gib=8.0)
    parser.add_argument("--shape", choices=list(SHAPES), default="tiny")
    parser.add_argument("--layers", type=int, help="instead of the shape's own number")
    parser.add_argument("--bias-layers", type=float, default=0.5, help="share of the layers with the bias (default: %(default)s)")
    parser.add_argument("--event-tokens", type=int, default=9, help="of a behaviour, its sink not counted")
    parser.add_argument("--batch-size", type=int, default=2, help="sequences of a step")
    parser.add_argument("--attention", default="sdpa", help="backend of ours (default: %(default)s)")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    return parser.parse_args()


def measure(args: argparse.Namespace, contestant: str, history: int) -> dict[str, Any]:
    """Time per step and peak memory of one contestant, in this process."""
    import torch

    from benchmarks.dense import DenseModel
    from benchmarks.training import Trainee
    from ctrsink.config.stages import Objective
    from ctrsink.families.decoder.build import build_model
    from ctrsink.families.parameters import set_trainable

    torch.set_num_threads(args.threads)
    spec = random_spec(shape_of(args.shape, args.layers), True, args.bias_layers, args.attention)
    model = build_model(spec, VOCABULARY, 0, args.precision)
    set_trainable(model, trained_groups(spec))
    trainee = Trainee(DenseModel(model) if contestant == "dense" else model, Objective(), args.device)
    batch = random_batch(args.batch_size, history, args.event_tokens, True)
    told = {"positions": batch.axes["positions"].longest}
    batch = batch.to(args.device)
    return told | growth.measured(lambda: trainee.step([batch]), args.steps, args.memory_gib, args.device)


if __name__ == "__main__":
    sys.exit(main())
