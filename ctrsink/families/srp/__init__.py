"""SRP4CTR: a transformer over behaviours is pre-trained, and candidates read it (arXiv 2407.19658)."""
