"""Variants of a model over several seeds, and what can be said of their differences."""
