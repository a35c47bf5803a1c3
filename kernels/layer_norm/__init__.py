"""Layer normalisation of the last dimension."""
