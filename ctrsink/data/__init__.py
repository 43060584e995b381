"""From the raw log to batches: sources, preparation, the stream of sequences."""
