"""The fixtures of the launcher tests; the helpers themselves are importable under a name of their own."""

from launcher_bench import cli, cluster, lab_system, plain_recipe

__all__ = ["cli", "cluster", "lab_system", "plain_recipe"]
