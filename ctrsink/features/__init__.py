"""Signals: what is known of an event, its user and its item; the same pure functions in preparation, loader and scorer."""
