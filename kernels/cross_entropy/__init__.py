"""Cross-entropy of logits that already exist."""
