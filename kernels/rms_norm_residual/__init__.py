"""Residual addition followed by RMSNorm: the new residual is written once and read by nobody in between."""
