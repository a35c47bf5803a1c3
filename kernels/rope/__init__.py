"""Rotary position embedding of queries and keys, with an optional RMSNorm of each head before it (QK-norm)."""
