"""Numbers of sequences in an order that depends on no rank, and the batches that they become."""
