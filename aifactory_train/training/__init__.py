"""The loop: trainer, state, guard, checkpoints, stopping, metrics log."""
