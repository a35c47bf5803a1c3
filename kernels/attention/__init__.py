"""Causal attention of queries to the keys of their own document, with windows, chunks, sinks, soft caps and ALiBi."""
