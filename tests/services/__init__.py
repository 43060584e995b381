"""Real services that tests start for themselves, on the loopback address."""
