"""Embedding tables that no optimiser of PyTorch and no ZeRO stage sees: rows shared out over ranks, stepped where touched."""
