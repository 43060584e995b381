"""HSTU: a causal transformer over ids, which trains a chronology in one pass (arXiv 2402.17152)."""
