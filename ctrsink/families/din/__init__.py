"""DIN: a target weighs each behaviour of its history (arXiv 1706.06978)."""
