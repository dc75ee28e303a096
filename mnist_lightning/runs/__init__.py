"""A run: its folder, logger and checkpoints; stopping and resuming; what it prints."""
