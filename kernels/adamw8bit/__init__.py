"""AdamW with 8-bit moments, one fused pass over parameter, gradient and state."""
