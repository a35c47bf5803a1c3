"""The run folder and the outcome of each attempt."""
