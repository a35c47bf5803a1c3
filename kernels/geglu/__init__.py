"""``gelu(gate) * up``, with the tanh formula or exactly."""
