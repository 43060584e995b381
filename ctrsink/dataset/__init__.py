"""The prepared data set: its format on disk, and reading it."""
