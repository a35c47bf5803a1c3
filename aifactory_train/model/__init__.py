"""The model: loading, adapters, precision, attention, operators, loss."""
