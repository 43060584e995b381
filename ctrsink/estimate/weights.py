"""How many numbers a model holds, by what a stage does with them; counted on the meta device, without their memory."""

from dataclasses import dataclass

from ctrsink.families.parameters import set_trainable
from ctrsink.families.protocol import CTRModule
from ctrsink.tables.embedding import tables_of

PERSISTENT = 100_000
"""DeepSpeed's stage3_param_persistence_threshold: ZeRO-3 keeps parameters of at most so many numbers whole on every rank."""


@dataclass(frozen=True)
class Weights:
    """Of a model, in one stage."""

    groups: dict[str, int]
    """Parameters by group, all of them; rows of sharded tables among them."""
    trained: int
    """Parameters that DeepSpeed trains."""
    frozen: int
    trained_bytes: int
    frozen_bytes: int
    persistent_bytes: int
    """Of those small enough to stay whole under ZeRO-3."""
    largest_bytes: int
    """Of the largest parameter."""
    tables: tuple[tuple[int, int], ...]
    """Rows and width of each sharded table."""
    tables_trained: bool

    @property
    def bytes(self) -> int:
        """Of all weights that DeepSpeed holds."""
        return self.trained_bytes + self.frozen_bytes

    @property
    def in_tables(self) -> int:
        """Numbers in sharded tables."""
        return sum(rows * width for rows, width in self.tables)


def weights_of(module: CTRModule, trainable: tuple[str, ...], held_in: str = "fp32") -> Weights:
    """Count a module, best one of `Family.shape`; afterwards it is as `trainable` says, in requires_grad and types.

    Args:
        held_in: `train.weights`.
    """
    set_trainable(module, trainable, held_in)
    groups: dict[str, int] = {}
    counts, sizes = {True: 0, False: 0}, {True: 0, False: 0}
    persistent = largest = 0
    for name, parameter in module.named_parameters():
        group, held = module.group_of(name), parameter.numel() * parameter.element_size()
        groups[group] = groups.get(group, 0) + parameter.numel()
        counts[parameter.requires_grad] += parameter.numel()
        sizes[parameter.requires_grad] += held
        largest = max(largest, held)
        if parameter.numel() <= PERSISTENT:
            persistent += held
    tables = tables_of(module)
    for name, table in tables.items():
        group = module.group_of(f"{name}.weight")
        groups[group] = groups.get(group, 0) + table.rows * table.width
    return Weights(
        groups=groups,
        trained=counts[True],
        frozen=counts[False],
        trained_bytes=sizes[True],
        frozen_bytes=sizes[False],
        persistent_bytes=persistent,
        largest_bytes=largest,
        tables=tuple((table.rows, table.width) for table in tables.values()),
        tables_trained=any(module.trained_as(f"{name}.weight", trainable) is not None for name in tables),
    )
