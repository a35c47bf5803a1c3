"""Tools around the kernels: cross-compilation, interpretation with exact rounding, traffic counting, tuning, timing."""
