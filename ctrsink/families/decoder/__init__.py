"""CTR-Sink: a decoder language model whose history has sinks (arXiv 2508.03668)."""
