"""What must train before a release is trusted on GPUs, as data: each case is a process or two and the losses to come."""

import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

import yaml

from tests.runs import run_tree

STEPS = (3, 5)  # of the two stages
STOPS_AT = 4  # in the second one
TOLERANCE = {"fp32": 1e-3, "bf16": 0.05}  # of a loss, to that of one process in fp32 on a CPU


@dataclass(frozen=True)
class Case:
    """One way to train the same steps."""

    precision: Literal["fp32", "bf16"]
    zero_stage: Literal[0, 1, 2, 3]
    attention: Literal["sdpa", "flex"]
    checkpointing: bool
    resume: bool
    """Stopped after `STOPS_AT` steps, then continued by a new process."""
    ranks: Literal[1, 2]

    def __str__(self) -> str:
        marks = ("checkpointing" * self.checkpointing, "resumed" * self.resume, f"{self.ranks}ranks")
        return "-".join(filter(None, (self.precision, f"zero{self.zero_stage}", self.attention, *marks)))

    def tree(self, data: str, run_dir: str, device: str = "cuda") -> dict[str, Any]:
        """The run's configuration."""
        kind = "local" if self.ranks == 1 else "ray"
        tree = run_tree(
            data,
            run_dir,
            model={
                # As flex wants them: heads of 16 dimensions, and no dropout in attention.
                "backbone": {"config": {"hidden_size": 32, "attention_dropout": 0.0}},
                "attention": self.attention,
                "gradient_checkpointing": self.checkpointing,
            },
            train={"precision": self.precision, "zero_stage": self.zero_stage},
            runtime={"kind": kind, "workers": self.ranks, "device": device},
            evaluate={"splits": []},
        )
        for stage, steps in zip(tree["stages"], STEPS, strict=True):
            stage["steps"] = steps
        return tree

    def commands(self, data: str, folder: Path, device: str = "cuda") -> list[list[str]]:
        """The processes, one after another; the configuration is written to `folder`, the run goes to `folder/run`."""
        path = folder / "run.yaml"
        path.write_text(yaml.safe_dump(self.tree(data, str(folder / "run"), device)))
        train = [sys.executable, "-m", "ctrsink", "train", "--config", str(path)]
        return [[*train, "--stop-after", str(STOPS_AT)], [*train, "--resume"]] if self.resume else [train]


CASES = [
    Case(*values)
    for values in product(("fp32", "bf16"), (0, 1, 2, 3), ("sdpa", "flex"), (False, True), (False, True), (1, 2))
]  # fmt: skip
REFERENCE = Case("fp32", 0, "sdpa", checkpointing=False, resume=False, ranks=1)
