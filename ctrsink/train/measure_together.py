"""Measure the model of a run by the workers that would train it: on their devices, in the run's precision, sharded as there."""

from ctrsink.config import RunSpec
from ctrsink.dist import Topology, all_max
from ctrsink.errors import InputError
from ctrsink.families.facts import Facts
from ctrsink.run.listing import Step
from ctrsink.train.checkpoint.checkpoint import find_checkpoint
from ctrsink.train.checkpoint.native import opened
from ctrsink.train.loop import Trainer
from ctrsink.train.measure import naming
from ctrsink.train.observe.hardware import precision_of
from ctrsink.train.restore import require_clicks


def evaluate_together(spec: RunSpec, topology: Topology, facts: Facts, step: Step) -> dict[str, dict[str, float]]:
    """Collective: metrics by split of `spec.evaluate` of the run in `spec.run_dir`, as of a checkpoint (default: the latest).

    They are what the run itself would have measured there, and are written to its folder as it does.

    Raises:
        InputError: there is no such checkpoint, its predictions are not finite, or the data set is not what it was.
    """
    trainer = Trainer(spec, topology, facts)
    # The first rank chooses: another might see a newer one by now.
    found = find_checkpoint(spec.run_dir, step, topology) if topology.is_first else None
    number = all_max(found.step if found else 0, topology)
    checkpoint, damage = opened(spec.run_dir, number, found, topology)
    if checkpoint is None or damage is not None:
        raise InputError(damage or f"{spec.run_dir} has no checkpoint of step {number}")
    trainer.take_up(checkpoint)
    require_clicks(spec.run_dir, checkpoint, trainer.controller.stage)
    trainer.progress.precision = precision_of(spec.train.precision, checkpoint.precision, topology)
    with naming(spec.run_dir, number):
        return trainer.evaluate()
