"""What the families share that read ids and signals, and no text."""
