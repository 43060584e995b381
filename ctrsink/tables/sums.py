"""Sums of vectors by row, of few rows out of very many."""

import torch


def merged(rows: torch.Tensor, vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 [n] with repeats and [n, D] -> each row once, ascending, int64 [u], and the sums of its vectors [u, D]."""
    once, place = torch.unique(rows, return_inverse=True)
    return once, vectors.new_zeros(len(once), vectors.shape[1]).index_add_(0, place, vectors)


class RowSums:
    """What has been added, for each row; memory is that of the rows added, not of all there are.

    Args:
        width: D.
    """

    def __init__(self, width: int) -> None:
        self._width = width
        self._parts: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._held = self._merged = 0

    def add(self, rows: torch.Tensor, vectors: torch.Tensor) -> None:
        """Rows, ascending and each once, int64 [n], and [n, D] fp32; both are kept as they are."""
        self._parts.append((rows, vectors))
        self._held += len(rows)
        if self._held > 2 * self._merged:  # so that the work of merging stays in proportion to what is added
            self._merge()

    def take(self, device: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Each row once, ascending, int64 [u], and its sum [u, D], fp32; nothing is left behind."""
        if not self._parts:
            return torch.zeros(0, dtype=torch.int64, device=device), torch.zeros(0, self._width, device=device)
        self._merge()
        (found,) = self._parts
        self.clear()
        return found

    def clear(self) -> None:
        """Forget all."""
        self._parts, self._held, self._merged = [], 0, 0

    def _merge(self) -> None:
        if len(self._parts) > 1:
            rows, vectors = (torch.cat(both) for both in zip(*self._parts, strict=True))
            self._parts = [merged(rows, vectors)]
        self._held = self._merged = sum(len(rows) for rows, _ in self._parts)
