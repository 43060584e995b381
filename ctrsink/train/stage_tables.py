"""What an engine does with the tables that DeepSpeed does not hold; one gradient and one clipping with all that it does."""

from collections.abc import Mapping
from typing import Any

from ctrsink.config.stages import StageSpec
from ctrsink.dist import Topology, all_sum
from ctrsink.families.protocol import CTRModule
from ctrsink.tables.embedding import held_of, share_out
from ctrsink.tables.shares import Share
from ctrsink.train.deepspeed_import import combine_grad_norm_groups


class StageTables:
    """The sharded tables of a model while a stage trains it; where it has none, nothing is done or waited for.

    A table is of the group that the parameter `<its part>.weight` would be of.

    Args:
        held: this rank's rows to go on with, see share_out; None: a new run's.
    """

    def __init__(self, model: CTRModule, stage: StageSpec, topology: Topology, held: Mapping[str, Share] | None) -> None:
        self.topology = topology
        self.all = share_out(model, topology, held)
        groups = {name: model.trained_as(f"{name}.weight", stage.trainable) for name in self.all}
        for name, table in self.all.items():
            table.trained = groups[name] is not None
            table.make()
        self._trained = [(self.all[name], group) for name, group in groups.items() if group is not None]
        self.norm = 0.0
        """Of the gradient that was collected last, over all ranks and tables; no number where it holds none."""

    def join(self, optimizer: Any, zero_stage: int) -> None:
        """Have DeepSpeed take the tables for one more group of parameters where it measures the gradient, under ZeRO 1 to 3.

        So it clips by the norm of all there is, and skips a step of which any part is not finite. It has no other place for this:
        DeepSpeed 0.19.8 adds up the norms of groups in `scaled_global_norm` under ZeRO 1 and 2, of `_get_norm_groups` under 3.
        """
        if not self._trained or zero_stage == 0:
            return
        if zero_stage == 3:
            of_groups = optimizer._get_norm_groups
            optimizer._get_norm_groups = lambda: [*of_groups(), self.norm]
        else:
            of_all = optimizer.scaled_global_norm
            optimizer.scaled_global_norm = lambda: combine_grad_norm_groups([of_all(), self.norm])

    def collect(self) -> None:
        """Collective, after the last backward of a step: bring gradients to the owners of their rows."""
        if self._trained:
            for table, _ in self._trained:
                table.collect(self.topology.world)  # DeepSpeed averages over ranks, and the loss was multiplied for that
            self.norm = all_sum([sum(table.squared_norm() for table, _ in self._trained)], self.topology)[0] ** 0.5

    def step(self, stage: StageSpec, factor: float, scale: float) -> None:
        """Train the rows that were looked up.

        Args:
            factor: of the learning rates.
            scale: of the gradient.
        """
        for table, group in self._trained:
            table.step(stage.lr[group] * factor, scale)

    def discard(self) -> None:
        """Forget the gradient of a step that is left out."""
        for table, _ in self._trained:
            table.discard()

    def is_finite(self) -> bool:
        """Whether all values on this rank are finite numbers."""
        return all(table.is_finite() for table in self.all.values())

    def held(self) -> dict[str, Share]:
        """What an engine on another model goes on with."""
        return held_of(self.all)
