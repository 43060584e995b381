"""How large a micro-batch may be, for a plan and for a run with `micro_batch_tokens: auto` alike."""

from ctrsink.estimate.activations import Activations

SHARE = 0.7
"""Of the memory that weights, optimiser and gradients leave: unequal lengths in a batch, and gaps, need the rest."""


def tokens_within(activations: Activations, free: float, reserved: float = 0.0, given: float | None = None) -> int:
    """Tokens of the largest micro-batch; 0 where none fits.

    Args:
        free: bytes that nobody uses now.
        reserved: of these, what a step needs beside activations.
        given: bytes that activations may fill (`train.memory_gib`), in place of SHARE of what is free.
    """
    return activations.tokens(SHARE * (free - reserved) if given is None else given)
