"""SparseCTR: sparse attention over the chunks of a long history (arXiv 2601.17836)."""
